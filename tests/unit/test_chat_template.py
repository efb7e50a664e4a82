# SPDX-License-Identifier: Apache-2.0
"""The bundled model's chat template: every form of a message that clients of the APIs send."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from himap_demo import MODEL_PATH
from himap_server.schemas import ChatRequest, ResponsesBody
from vllm.config import ModelConfig
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template
from vllm.tokenizers import get_tokenizer

from tests.gateway.clients import DATA_URL
from training.tokenizer import CHAT_TEMPLATE

# The template that the model was trained and measured with.
TRAINED_WITH = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    " {% if content is string %}{{ content }}{% else %}{{ content[0]['text'] }}{% endif %}"
    "{{ eos_token }}"
    "{% else %}USER: "
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} ASSISTANT:{% endif %}{% endfor %}"
)


@cache
def _config() -> ModelConfig:
    return ModelConfig(model=str(MODEL_PATH))


@cache
def _tokenizer() -> Any:
    return get_tokenizer(str(MODEL_PATH))


def rendered(messages: Any) -> str:
    """The prompt that vLLM makes of chat messages."""
    config, tokenizer = _config(), _tokenizer()
    form = resolve_chat_template_content_format(None, None, "auto", tokenizer, model_config=config)
    conversation, _, _ = parse_chat_messages(messages, config, form)
    text: str = safe_apply_chat_template(
        config, tokenizer, conversation, tokenize=False, add_generation_prompt=True
    )
    return text


def chat(messages: Any) -> str:
    body = {"model": "m", "messages": messages}
    return rendered(ChatRequest.model_validate(body, from_attributes=True).messages)


def responses(items: Any, instructions: str | None = None) -> str:
    body = {"model": "m", "input": items, "instructions": instructions}
    request: Any = ResponsesBody.model_validate(body, from_attributes=True)
    return rendered(
        construct_input_messages(
            request_instructions=request.instructions, request_input=request.input
        )
    )


# As trained

TEXT = {"type": "text", "text": "What color is the star?"}
MORE = {"type": "text", "text": " And the card?"}
IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [IMAGE, TEXT]}],
        [{"role": "user", "content": [TEXT, IMAGE, MORE, IMAGE]}],
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": []}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [TEXT]}],
        [
            {"role": "user", "content": [IMAGE, TEXT]},
            {"role": "assistant", "content": "pink"},
            {"role": "user", "content": [MORE]},
        ],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [TEXT]}],
        [{"role": "tool", "content": "4"}, {"role": "user", "content": " < & \" ' é\n{{ x }}"}],
    ],
)
def test_what_the_model_was_trained_on_is_rendered_as_then(messages: Any) -> None:
    tokenizer = _tokenizer()
    then = tokenizer.apply_chat_template(messages, chat_template=TRAINED_WITH, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == then
    assert then.startswith("<s>")


def test_training_writes_this_template() -> None:
    assert _tokenizer().chat_template == CHAT_TEMPLATE
    assert (MODEL_PATH / "chat_template.jinja").read_text() == CHAT_TEMPLATE


# The chat API

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "paint", "arguments": '{"colour": "red", "é": [1, null]}'},
}
CALLED = (
    '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "é": [1, null]}}\n</tool_call>'
)
CALLED_EMPTY = '<tool_call>\n{"name": "paint", "arguments": {}}\n</tool_call>'
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
ASKED = {"role": "user", "content": "Hi"}
FIRST = "<s>USER: Hi ASSISTANT: "
LAST = "</s>USER: done ASSISTANT:"
BOTH = TEXT["text"] + MORE["text"]
URL = {"type": "image_url", "image_url": {"url": DATA_URL}}


def _call(arguments: Any) -> dict[str, Any]:
    return {**CALL, "function": {"name": "paint", "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "pink"}, "pink"),
        ({"content": ""}, ""),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": []}, ""),
        ({"content": [TEXT]}, BOTH[: len(TEXT["text"])]),
        ({"content": [TEXT, MORE]}, BOTH),
        ({"content": "pink", "tool_calls": None, "function_call": None, "audio": None}, "pink"),
        ({"content": "pink", "tool_calls": []}, "pink"),
        ({"content": "pink", "refusal": None}, "pink"),
        ({"content": "pink", "reasoning": "Hm.", "name": "model"}, "pink"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"refusal": "No."}, "No."),
        ({"content": [], "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [TEXT, MORE, {"type": "refusal", "refusal": "No."}]}, BOTH + "No."),
        ({"content": None, "tool_calls": [CALL]}, CALLED),
        ({"tool_calls": [CALL]}, CALLED),
        ({"content": [], "tool_calls": [CALL]}, CALLED),
        ({"content": "", "tool_calls": [CALL], "refusal": None}, CALLED),
        ({"content": "Look:", "tool_calls": [CALL, CALL]}, "Look:" + CALLED + CALLED),
        ({"content": [TEXT, MORE], "tool_calls": [{**CALL, "index": 0}]}, BOTH + CALLED),
        ({"tool_calls": [_call("{}")]}, CALLED_EMPTY),
        ({"tool_calls": [_call("")]}, CALLED_EMPTY),
        ({"tool_calls": [_call("not JSON")]}, CALLED_EMPTY),
    ],
    ids=ascii,
)
def test_an_assistants_message(message: dict[str, Any], text: str) -> None:
    conversation = [ASKED, {"role": "assistant", **message}, RESULT]
    # A copy: vLLM writes into calls.
    assert chat(json.loads(json.dumps(conversation))) == FIRST + text + LAST


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "system", "content": "Hi"}, "Hi"),
        ({"role": "system", "content": [TEXT, MORE]}, BOTH),
        ({"role": "developer", "content": "Hi"}, "Hi"),
        ({"role": "user", "content": [TEXT, MORE], "name": "me"}, BOTH),
        ({"role": "user", "content": [TEXT, URL, MORE, URL]}, "<image>\n<image>\n" + BOTH),
        ({"role": "user", "content": []}, ""),
        ({"role": "tool", "tool_call_id": "call_1", "content": [TEXT, MORE]}, None),
        ({"role": "tool", "tool_call_id": "call_1", "content": [URL, TEXT]}, None),
        ({"role": "tool", "tool_call_id": "call_1", "content": ""}, ""),
        ({"role": "function", "name": "paint", "content": "done"}, "done"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_messages_of_other_roles(message: dict[str, Any], text: str | None) -> None:
    if text is None:  # vLLM joins the texts of a tool by line breaks
        images = sum(part["type"] == "image_url" for part in message["content"])
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        text = "<image>\n" * images + "\n".join(texts)
    assert chat([message]) == f"<s>USER: {text} ASSISTANT:"


def test_messages_as_transformers_renders_them() -> None:
    """Without vLLM in between, which turns arguments into objects and all parts into `text`."""
    conversation = [
        {"role": "user", "content": [{"type": "image"}, "Hi"]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        RESULT,
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [TEXT, {"type": "refusal", "refusal": "No."}]},
        {"role": "assistant"},
    ]
    assert _tokenizer().apply_chat_template(conversation, tokenize=False) == (
        f"<s>USER: <image>\nHi ASSISTANT: {CALLED}</s>USER: done ASSISTANT:"
        f" No.</s> {TEXT['text']}No.</s> </s>"
    )


# The Responses API

SAID = {"type": "output_text", "text": "pink"}
FUNCTION_CALL = {"type": "function_call", "call_id": "call_1", **CALL["function"]}  # type: ignore[dict-item]
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "done"}


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([{"role": "assistant", "content": "pink"}], "pink"),
        ([{"role": "assistant", "content": "pink", "type": "message"}], "pink"),
        ([{"role": "assistant", "content": [SAID]}], "pink"),
        ([{"role": "assistant", "content": [SAID, {**SAID, "annotations": []}]}], "pinkpink"),
        ([{"role": "assistant", "content": []}], ""),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}], "No."),
        (
            [
                {
                    **{
                        "type": "message",
                        "role": "assistant",
                        "id": "msg_1",
                        "status": "completed",
                    },
                    "content": [{**SAID, "annotations": None, "logprobs": None}, SAID],
                    "phase": None,
                }
            ],
            "pinkpink",
        ),
        ([FUNCTION_CALL], CALLED),
        ([{**FUNCTION_CALL, "id": "fc_1", "status": "completed", "namespace": None}], CALLED),
        ([{**FUNCTION_CALL, "id": None, "status": None}], CALLED),
        ([{"role": "assistant", "content": [SAID]}, FUNCTION_CALL], "pink" + CALLED),
        ([FUNCTION_CALL, {"role": "assistant", "content": [SAID]}], "pink" + CALLED),
        ([FUNCTION_CALL, {**FUNCTION_CALL, "call_id": "call_2"}], CALLED + CALLED),
        ([{"type": "reasoning", "id": "rs_1", "summary": []}, FUNCTION_CALL], CALLED),
        (
            [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
                {"role": "assistant", "content": [SAID]},
            ],
            "pink",
        ),
    ],
    ids=lambda value: ascii(value)[:90],
)
def test_what_an_assistant_answered_before(items: list[Any], text: str) -> None:
    conversation = [{"role": "user", "content": "Hi"}, *items, OUTPUT]
    assert responses(json.loads(json.dumps(conversation))) == FIRST + text + LAST


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"role": "user", "content": [{"type": "input_text", "text": BOTH}] * 2}, BOTH * 2),
        (
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Hi"},
                    {"type": "input_image", "image_url": DATA_URL, "detail": "auto"},
                ],
            },
            "<image>\nHi",
        ),
        ({"type": "message", "role": "system", "content": "Hi", "status": "completed"}, "Hi"),
        ({**OUTPUT, "output": [{"type": "input_text", "text": "done"}]}, "done"),
        (
            {
                **OUTPUT,
                "output": [
                    {"type": "input_text", "text": "done"},
                    {"type": "input_image", "image_url": DATA_URL, "detail": "auto"},
                ],
            },
            "<image>\ndone",
        ),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_items_of_other_roles(item: dict[str, Any], text: str) -> None:
    first = "<s>USER: Be brief. ASSISTANT:"
    assert responses([item], "Be brief.") == f"{first}USER: {text} ASSISTANT:"


def test_an_input_that_is_a_text() -> None:
    assert responses("Hi") == "<s>USER: Hi ASSISTANT:"


def test_random_prompts_of_load_generators_have_no_image_token() -> None:
    """They leave out `all_special_ids`; the gateway refuses an image token without an image."""
    assert "<image>" in _tokenizer().all_special_tokens
