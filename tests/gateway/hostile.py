# SPDX-License-Identifier: Apache-2.0
"""The hostile catalogue: requests that a server must refuse, one by one.

The fuzz tests send each of them once and `bench.soak` sends them by the thousand. All are for a
server of the model `tiny`, with 512 tokens at most, `--max-deep-ratio 0.9` and tool calls.
"""

from __future__ import annotations

import gzip
from typing import Any

from tests.checkpoints import IMAGE_ID, sample_images
from tests.servers import picture_message

WORD = "wizardry"  # unknown to the server; the soak replaces it by a new word in each request

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PICTURE: Any = picture_message(sample_images(1, seed=3)[0], "What is this?")
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [PICTURE], "max_tokens": 4},
    TEXT: {"model": "tiny", "prompt": "Once", "max_tokens": 4},
    RESPONSES: {"model": "tiny", "input": "Once", "max_output_tokens": 4},
}

# Bodies that are no JSON, or none that a server should read.

_DEEP = 100_000
_TAIL = b',"messages":[{"role":"user","content":"x"}]}'
BODIES = {
    "empty": b"",
    "no-json": b"{",
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
    "binary": b"\xff\xfe\x00",
    "latin-1": b'{"model":"\xe4"' + _TAIL,
    "nested-arrays": b"[" * _DEEP,
    "nested-objects": b'{"a":' * _DEEP,
    "nested-and-closed": b'{"model":"tiny","x":' + b"[" * _DEEP + b"]" * _DEEP + _TAIL,
    "nested-messages": b'{"model":"tiny","messages":' + b"[" * 500 + b"]" * 500 + b"}",
    "long-number": b'{"model":"tiny","max_tokens":' + b"9" * 5000 + _TAIL,
    "beyond-double": b'{"model":"tiny","temperature":1e400' + _TAIL,
    "duplicate-key": b'{"himap":{"deep_ratio":0,"deep_ratio":2},"model":"tiny"' + _TAIL,
    "compressed": gzip.compress(b'{"model":"tiny"' + _TAIL),
}

CONTENT_TYPES = (
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonx", "x",
)  # fmt: skip

IMAGE_URLS: tuple[Any, ...] = (
    "data:image/png;base64,AAAA",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "file:///etc/hostname",
    "http://127.0.0.1:1/x.png",
    "http://169.254.169.254/latest/meta-data",
    "",
    5,
)

# Fields. Each is put over a good request, with an image for chat.

LONE = "\ud800"  # half of a surrogate pair: JSON can spell it, UTF-8 can't
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def _values(*values: Any) -> tuple[Any, ...]:
    return values


def _each(name: str, *values: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


def with_schema(schema: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": schema}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


CHAT_FIELDS: list[dict[str, Any]] = [
    {"model": WORD},
    {"model": 5},
    {"model": LONE},
    {"model": "../tiny"},
    *_each("max_tokens", -1, 513, 10**30, "many"),
    *_each("n", 0, -1, 10**6, 1.5),
    *_each("seed", 10**31, "x"),
    *_each("temperature", -1, 3, "hot"),
    *_each("top_k", -2, 10**31),
    *_each("top_p", -1, 1.1),
    *_each("min_tokens", -1, 10),
    {"repetition_penalty": 0},
    {"priority": 10**30},
    # Of strings
    *_each("stop", [f"x{index}" for index in range(1000)], [""], [LONE], 5),
    *_each("bad_words", [""], [LONE], [5]),
    *_each("logit_bias", {WORD: 1}, {"999999": 1}, {"-1": 1}, [], {"1": None}),
    *_each("stop_token_ids", [-1], [10**30], ["a"]),
    *_each("allowed_token_ids", [], [-1], [10**6]),
    *_each("top_logprobs", -2, 10**6),
    *_each("prompt_logprobs", -2, 10**6),
    # Of messages
    *_each("messages", [], {}, "x", ["x"], [{}], [{"content": "x"}]),
    *map(user, _values(None, 5, LONE, [["x"]], [{"type": "text"}], [{"type": "?"}])),
    user("x" * 100_000),
    user([{"type": "text", "text": 5}]),
    user([{"type": "video_url", "video_url": WORD}]),
    user("hi <image>"),
    {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"role": LONE, "content": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": 5}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    {"messages": [PICTURE] * 17},
    {"messages": [PICTURE] * 16},  # longer than the model can take
    # Of tools
    *_each("tools", {}, "x", [{}], [{"type": "function"}], [{"type": "mcp"}], [{"type": WORD}]),
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
    {"tools": [_TOOL], "tool_choice": "?"},
    {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    {"tool_choice": "required"},
    {
        "tools": [{"type": "function"}],
        "tool_choice": {"type": "function", "function": {"name": "a"}},
    },
    *(
        {
            "tools": [{"type": "function", "function": {
                "name": "f", "strict": True, "parameters": schema,
            }}],
            "tool_choice": "required",
        }
        for schema in ({"type": "?"}, {"$ref": "#/nowhere"})
    ),
    # Of structured output
    *(
        {"structured_outputs": {"regex": value}}
        for value in ("(", f"({WORD}", "a{", "(?=a)b", "\\1", LONE)
    ),
    *_each("structured_outputs", "x", 5, ["x"]),
    {"structured_outputs": {"regex": "(" * 2000 + ")" * 2000}},
    *map(with_schema, _values({"type": WORD}, {"$ref": "#/x"}, {"enum": []}, 5, "x")),
    with_schema({"type": "string", "pattern": "("}),
    with_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    with_schema(_nested(300)),
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"structural_tag": "{"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    *({"response_format": {"type": value}} for value in (WORD, "json_schema", "structural_tag")),
    # Of vLLM
    {"chat_template": WORD},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"chat_template": "x"}},
    {"mm_processor_kwargs": {WORD: 1}},
    {"mm_processor_kwargs": {"size": {"height": 10**6, "width": 10**6}}},
    {"media_io_kwargs": {"image": {"a": 1}}},
    *_each("truncate_prompt_tokens", -5, 0, 10, 10**9),
    *_each("cache_salt", "", 5, "x" * 10**6, "a/b", "\0", LONE),
    {"use_beam_search": True},
    {"stream_options": {"include_usage": True}},  # without a stream
    # Of pruning
    *_each(
        "vllm_xargs",
        {f"himap_{WORD}": 1}, {"himap_deep_ratio": 0.99}, {"himap_shallow_ratio": "a"},
        {"himap_shallow_ratio": [1]}, {"himap_deep_ratio": -1}, {LONE: 1}, {"a": {"b": 1}}, [],
        {"himap_votes": LONE}, {"himap_votes": ["all"]},
    ),
    *_each("himap", {LONE: 1}, {"deep_ratio": 2}, {WORD: 1}, {"votes": LONE}, [], 5),
]  # fmt: skip

TEXT_FIELDS: list[dict[str, Any]] = [
    *_each(
        "prompt",
        None, "", [], {}, 5, [[]], [1.5], [1, "a"], [[1], "a"], [[[5]]], LONE, "x" * 100_000,
        [-1], [10**6], [2**63], [[5], [10**6]], [5] * 600, [IMAGE_ID], [[1, IMAGE_ID]],
    ),
    *_each("logprobs", -1, 10**6),
    {"suffix": "x"},
    {"echo": "x"},
    {"n": 10**6},
    *_each("structured_outputs", "x", 5, ["x"]),
]  # fmt: skip

RESPONSES_FIELDS: list[dict[str, Any]] = [
    *_each(
        "input",
        None, [], 5, ["x"], [None], LONE, [{"type": "message"}], [{"role": "user"}],
        [{"role": "user", "content": [{"type": "input_text"}]}],
        [{"role": "wizard", "content": "x"}],
        [{"type": "item_reference", "id": "x"}],
    ),
    {"previous_response_id": "resp_x"},
    {"previous_response_id": LONE},
    {"background": True},
    {"prompt": {"id": "x"}},
    *_each("tools", 5, [{}], [{"type": "function"}]),
    *_each("tool_choice", "required", "?", {"type": "function", "name": "g"}),
    *_each("text", 5, {"format": {"type": "?"}}),
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}},
    *_each("max_output_tokens", 0, -1, 10**30),
    *_each("top_k", -2, 10**31),
    {"metadata": {"a": LONE}},
    {"instructions": LONE},
    {"user": LONE},
    {"include": ["?"]},
    {"truncation": "?"},
]  # fmt: skip

FIELDS = [
    (path, fields)
    for path, several in ((CHAT, CHAT_FIELDS), (TEXT, TEXT_FIELDS), (RESPONSES, RESPONSES_FIELDS))
    for fields in several
]


# What is out of range, and the field that `error.param` names.
_SAMPLING: list[tuple[dict[str, Any], str]] = [
    *(({"temperature": value}, "temperature") for value in (-1, 3)),
    *(({"top_p": value}, "top_p") for value in (-1, 2)),
    ({"top_k": -2}, "top_k"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    *(({"seed": value}, "seed") for value in (2**63, -(2**63) - 1)),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {WORD: 1}}, "logit_bias"),
]
_OF_VLLM: list[tuple[dict[str, Any], str]] = [
    *(({"n": value}, "n") for value in (0, -1, 10**6)),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    *(({"min_tokens": value}, "min_tokens") for value in (-1, 10)),
    ({"max_tokens": -1}, "max_tokens"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
    ({"stop": [""]}, "stop"),
    ({"bad_words": [""]}, "bad_words"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": WORD}}}, "structured_outputs"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"repetition_detection": {"max_pattern_size": -1}}, "repetition_detection"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"thinking_token_budget": -5}, "thinking_token_budget"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
]
OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    *((path, *case) for path in GOOD for case in _SAMPLING),
    *((path, *case) for path in (CHAT, TEXT) for case in _OF_VLLM),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 10**6}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 10**6}, "max_tokens"),
    (CHAT, {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
    (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 2000}]}, "messages"),
    (TEXT, {"max_tokens": 10**6}, "max_tokens"),
    (TEXT, {"logprobs": 10**6}, "logprobs"),
    (TEXT, {"logprobs": -1}, "logprobs"),
    (TEXT, {"prompt": "x " * 2000}, "prompt"),
    (TEXT, {"prompt": [10**6]}, "prompt"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": 10**6}, "max_output_tokens"),
    (
        RESPONSES,
        {"top_logprobs": 10**6, "include": ["message.output_text.logprobs"]},
        "top_logprobs",
    ),
    (RESPONSES, {"input": "x " * 2000}, "input"),
]
