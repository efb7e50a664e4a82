# SPDX-License-Identifier: Apache-2.0
"""The gateway through the OpenAI SDK."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.gateway.clients import (
    DATA_URL,
    GREEDY,
    HIMAP,
    KEPT_DEEP,
    NUM_TOKENS,
    QUESTION,
    ROOM,
    Expected,
    Paint,
    chat_messages,
    responses_input,
    savings,
    tool,
)
from tests.gateway.images import ImageHost
from tests.gateway.support import client
from tests.servers import Server

# The OpenAI SDK: chat


def test_openai_chat(server: Server, url: str, expected: Expected) -> None:
    answer = client(server).chat.completions.create(
        messages=chat_messages(url), extra_body={"himap": HIMAP}, **GREEDY
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    usage = answer.usage.model_dump(exclude_none=True)
    usage["himap"] = savings(usage["himap"])
    assert usage == {key: value for key, value in expected.usage.items() if value is not None}


def test_openai_chat_stream(server: Server, url: str, expected: Expected) -> None:
    chunks = list(
        client(server).chat.completions.create(
            messages=chat_messages(url),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"himap": HIMAP},
            **GREEDY,
        )
    )
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == expected.text
    assert sum(map(bool, deltas)) > 1
    assert len({chunk.id for chunk in chunks}) == 1
    *others, last = chunks
    assert all(chunk.usage is None for chunk in others)
    usage: Any = last.usage
    assert usage.prompt_tokens == expected.usage["prompt_tokens"]
    assert savings(usage.himap) == expected.usage["himap"]


def test_openai_chat_async(server: Server, url: str, expected: Expected) -> None:
    async def ask() -> tuple[Any, str, Any]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as asking:
            request: Any = {
                **GREEDY, "messages": chat_messages(url), "extra_body": {"himap": HIMAP},
            }  # fmt: skip
            answer = await asking.chat.completions.create(**request)
            text, usage = "", None
            async for chunk in await asking.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **request
            ):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                usage = chunk.usage
            return answer, text, usage

    answer, text, usage = asyncio.run(ask())
    assert answer.choices[0].message.content == text == expected.text
    assert savings(answer.usage.himap) == savings(usage.himap) == expected.usage["himap"]


def test_openai_async_requests_keep_their_own_options(
    server: Server, image_host: ImageHost
) -> None:
    ratios = (0.0, 0.25, 0.5, 0.75)

    async def ask() -> Any:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as asking:
            return await asyncio.gather(
                *(
                    asking.chat.completions.create(
                        messages=chat_messages(image_host.url(f"{index}.png")),
                        extra_body={"himap": {"shallow_ratio": ratio, "deep_ratio": 0}},
                        **GREEDY,
                    )
                    for index, ratio in enumerate(ratios)
                )
            )

    kept = [answer.usage.himap["kept_shallow"] for answer in asyncio.run(ask())]
    assert kept == [36, 27, 18, 9]


def test_openai_logprobs(server: Server, expected: Expected) -> None:
    answer = client(server).chat.completions.create(
        messages=chat_messages(DATA_URL),
        logprobs=True,
        top_logprobs=2,
        extra_body={"himap": HIMAP},
        **GREEDY,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert "".join(entry.token for entry in entries) == expected.text
    for entry in entries:
        first, second = entry.top_logprobs
        assert entry.logprob == first.logprob >= second.logprob
        assert bytes(first.bytes or []).decode() == entry.token


def test_openai_n_seed_and_temperature(server: Server) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client(server).chat.completions.create(
            model="tiny",
            messages=chat_messages(DATA_URL),
            max_tokens=16,
            temperature=1,
            n=2,
            seed=seed,
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.message.content for choice in answer.choices]

    texts = ask(1)
    assert texts[0] != texts[1]
    assert ask(1) == texts
    assert ask(2) != texts


def test_openai_accepts_these_too(server: Server, expected: Expected) -> None:
    """All of them are greedy, and so the same."""
    asking: Any = client(server).chat.completions
    request = {**GREEDY, "messages": chat_messages(DATA_URL)}
    for more in ({"n": 2}, {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_p": 0, "n": 2}):
        answer = asking.create(**{**request, **more}, extra_body={"himap": HIMAP})
        texts = [choice.message.content for choice in answer.choices]
        assert texts == [expected.text] * more.get("n", 1)
        assert answer.usage.himap["kept_deep"] == KEPT_DEEP
    answer = asking.create(**request, extra_body={"himap": HIMAP, "echo": True})
    assert answer.choices[0].message.content.endswith(expected.text)


def test_openai_echo_of_a_message_with_an_image(server: Server) -> None:
    """vLLM's own handler fails at it."""
    options = {"himap": HIMAP, "echo": True, "add_generation_prompt": False}
    request: dict[str, Any] = {**GREEDY, "messages": chat_messages(DATA_URL), "extra_body": options}
    asking: Any = client(server).chat.completions
    answer = asking.create(**request).choices[0].message.content
    assert QUESTION in answer
    chunks = [chunk.choices for chunk in asking.create(**request, stream=True)]
    assert "".join(choice.delta.content or "" for (choice,) in chunks) == answer


def test_openai_n_in_a_stream(server: Server) -> None:
    texts = ["", ""]
    for chunk in client(server).chat.completions.create(
        model="tiny",
        messages=chat_messages(DATA_URL),
        max_tokens=8,
        temperature=1,
        n=2,
        seed=1,
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts)) == 2
    assert all(texts)


def test_openai_stop(server: Server, expected: Expected) -> None:
    stop = expected.text[4:6]
    answer = client(server).chat.completions.create(
        messages=chat_messages(DATA_URL), stop=[stop], extra_body={"himap": HIMAP}, **GREEDY
    )
    assert answer.choices[0].message.content == expected.text.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


# The OpenAI SDK: tools and structured output

NAMED = {"type": "function", "function": {"name": "paint"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_openai_tools(server: Server, choice: Any) -> None:
    request: Any = {
        "model": "tiny",
        "messages": chat_messages(DATA_URL),
        "tools": [tool()],
        "tool_choice": choice,
        "parallel_tool_calls": False,  # a random model would go on calling
        "max_tokens": ROOM,
        "temperature": 0,
        "extra_body": {"himap": HIMAP},
    }
    answer: Any = client(server).chat.completions.create(**request)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    painted = Paint.model_validate_json(call.function.arguments)
    assert answer.usage.himap["kept_deep"] == KEPT_DEEP

    name, arguments = "", ""
    for chunk in client(server).chat.completions.create(stream=True, **request):
        for delta in chunk.choices[0].delta.tool_calls or ():
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert name == "paint"
    assert Paint.model_validate_json(arguments) == painted

    # What the tool said goes back with the call.
    conversation = [
        *request["messages"],
        {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "painted"},
    ]
    following = client(server).chat.completions.create(
        messages=conversation, tools=[tool()], tool_choice="none", **GREEDY
    )
    assert following.usage is not None
    assert following.usage.prompt_tokens > answer.usage.prompt_tokens
    assert following.choices[0].message.content


def test_openai_tools_auto(server: Server) -> None:
    """What a random model does of itself is no call; the parser must let it through."""
    answer = client(server).chat.completions.create(
        messages=chat_messages(DATA_URL), tools=[tool()], tool_choice="auto", **GREEDY
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_openai_structured_output(server: Server) -> None:
    request: Any = {
        "model": "tiny",
        "messages": chat_messages(DATA_URL),
        "max_tokens": ROOM,
        "temperature": 0,
        "extra_body": {"himap": HIMAP},
    }
    answer = client(server).chat.completions.parse(response_format=Paint, **request)
    painted = answer.choices[0].message.parsed
    assert isinstance(painted, Paint)
    assert answer.choices[0].finish_reason == "stop"
    usage: Any = answer.usage
    assert usage.himap["kept_deep"] == KEPT_DEEP

    schema = {**Paint.model_json_schema(), "additionalProperties": False}
    plain = client(server).chat.completions.create(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "paint", "schema": schema, "strict": True},
        },
        **request,
    )
    assert Paint.model_validate_json(plain.choices[0].message.content or "") == painted


# The OpenAI SDK: text completions and the Responses API


def test_openai_text_completions(server: Server) -> None:
    answer = client(server).completions.create(prompt=["Once", "Twice"], logprobs=1, **GREEDY)
    texts = [choice.text for choice in answer.choices]
    assert [len(text) for text in texts] == [NUM_TOKENS] * 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
    streamed, usage = "", None
    for chunk in client(server).completions.create(
        prompt="Once", stream=True, stream_options={"include_usage": True}, **GREEDY
    ):
        streamed += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage
    assert streamed == texts[0]
    assert usage is not None
    assert usage.completion_tokens == NUM_TOKENS
    echoed = client(server).completions.create(prompt="Once", echo=True, **GREEDY)
    assert echoed.choices[0].text == f"Once{texts[0]}"
    stopped = client(server).completions.create(prompt="Once", stop=texts[0][3], **GREEDY)
    assert stopped.choices[0].text == texts[0].partition(texts[0][3])[0]


def test_openai_responses(server: Server, url: str, expected: Expected) -> None:
    request: Any = {
        "model": "tiny",
        "input": responses_input(url),
        "max_output_tokens": NUM_TOKENS,
        "temperature": 0,
        "extra_body": {"himap": HIMAP},
    }
    answer: Any = client(server).responses.create(**request)
    assert answer.output_text == expected.responses_text
    assert answer.status == "incomplete"  # by max_output_tokens
    assert answer.usage.himap["kept_deep"] == KEPT_DEEP

    events: list[Any] = list(client(server).responses.create(stream=True, **request))
    assert events[0].type == "response.created"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.responses_text
    assert len(deltas) > 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert final.output_text == expected.responses_text
    assert final.usage.himap == answer.usage.himap
    assert final.id == events[0].response.id


def test_openai_responses_structured_output_and_tools(server: Server) -> None:
    request: Any = {
        "model": "tiny",
        "input": responses_input(DATA_URL),
        "max_output_tokens": ROOM,
        "temperature": 0,
    }
    answer = client(server).responses.parse(text_format=Paint, **request)
    assert isinstance(answer.output_parsed, Paint)
    tools: Any = [{"type": "function", **tool()["function"]}]
    called: Any = client(server).responses.create(
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        **request,
    )
    calls = [item for item in called.output if item.type == "function_call"]
    assert {call.name for call in calls} == {"paint"}
    assert Paint.model_validate_json(calls[0].arguments)


def test_openai_errors(server: Server) -> None:
    asking = client(server)
    with pytest.raises(openai.NotFoundError) as unknown:
        asking.chat.completions.create(**{**GREEDY, "model": "x"}, messages=chat_messages(DATA_URL))
    assert unknown.value.param == "model"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="deep_ratio") as bad:
            asking.chat.completions.create(
                messages=chat_messages(DATA_URL),
                stream=stream,
                extra_body={"himap": {"deep_ratio": 0.95}},
                **GREEDY,
            )
        assert bad.value.param == "himap.deep_ratio"
    assert asking.models.list().data[0].id == "tiny"
