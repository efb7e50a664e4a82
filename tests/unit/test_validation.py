# SPDX-License-Identifier: Apache-2.0
"""A refusal of a body is one sentence that names the field, whatever pydantic says of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from himap_server.errors import GatewayError
from himap_server.routes.body import _validate
from himap_server.schemas import ChatRequest, ResponsesBody, TextRequest
from pydantic import BaseModel

from tests.gateway.hostile import CHAT, FIELDS, GOOD, RESPONSES, TEXT, user

SCHEMAS: dict[str, type[BaseModel]] = {
    CHAT: ChatRequest,
    TEXT: TextRequest,
    RESPONSES: ResponsesBody,
}


def refused(path: str, fields: dict[str, Any]) -> GatewayError | None:
    body = json.loads(json.dumps({**GOOD[path], **fields}))
    try:
        _validate(SCHEMAS[path], body)
    except GatewayError as error:
        return error
    return None


def items(*content: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(content)}]}


def assistant(**message: Any) -> dict[str, Any]:
    good = {"role": "user", "content": "Hi"}
    return {"messages": [good, {"role": "assistant", **message}]}


FUNCTION = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"model": 5}, "model", "model must be a string"),
        (CHAT, {"max_tokens": "many"}, "max_tokens", "max_tokens must be an integer"),
        (CHAT, {"max_tokens": 1.5}, "max_tokens", "max_tokens must be an integer"),
        (
            CHAT,
            {"seed": 1e30},
            "seed",
            "seed must be an integer in [-9223372036854775808, 9223372036854775807]",
        ),
        (CHAT, {"temperature": "hot"}, "temperature", "temperature must be a number"),
        (CHAT, {"stop": 5}, "stop", "stop must be a string or an array"),
        (CHAT, {"stop": [5]}, "stop[0]", "stop[0] must be a string"),
        (CHAT, {"logit_bias": []}, "logit_bias", "logit_bias must be an object"),
        (CHAT, {"himap": {"votes": "x"}}, "himap.votes", "himap.votes must be 'turn' or 'all'"),
        (CHAT, {"messages": "x"}, "messages", "messages must be an array"),
        (CHAT, {"messages": ["x"]}, "messages[0]", "messages[0] must be an object"),
        (CHAT, {"messages": [{}]}, "messages[0].role", "messages[0].role is required"),
        (
            CHAT,
            {"messages": [{"role": 5}]},
            "messages[0].role",
            "messages[0].role must be a string",
        ),
        (
            CHAT,
            user(5),
            "messages[0].content",
            "messages[0].content must be a string or an array",
        ),
        (
            CHAT,
            user([{"type": "text"}]),
            "messages[0].content[0].text",
            "messages[0].content[0].text is required",
        ),
        (
            CHAT,
            user([{"type": "?"}]),
            "messages[0].content[0].type",
            'messages[0].content[0].type has an unknown value, "?"',
        ),
        (
            CHAT,
            assistant(tool_calls=5),
            "messages[1].tool_calls",
            "messages[1].tool_calls must be an array",
        ),
        (
            CHAT,
            assistant(tool_calls=[{"type": "function", "function": FUNCTION}]),
            "messages[1].tool_calls[0].id",
            "messages[1].tool_calls[0].id is required",
        ),
        (CHAT, {"himap": "on"}, "himap", "himap must be an object"),
        (
            CHAT,
            {"himap": {"shallow_ratio": 1}},
            "himap.shallow_ratio",
            "himap.shallow_ratio must be less than 1",
        ),
        (CHAT, {"himap": {"ratio": 0}}, "himap.ratio", "himap.ratio is not permitted"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", None),
        (RESPONSES, {"input": 5}, "input", "input must be a string or an array"),
        (RESPONSES, {"input": []}, None, None),
        (
            RESPONSES,
            items({"type": "input_text"}),
            "input[0].content[0].text",
            "input[0].content[0].text is required",
        ),
        (
            RESPONSES,
            items({"type": "output_text", "text": "Hi"}),
            "input[0].content[0].type",
            'input[0].content[0].type has an unknown value, "output_text"',
        ),
        (
            RESPONSES,
            {"input": [{"type": "nope"}]},
            "input[0].type",
            'input[0].type has an unknown value, "nope"',
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call", "name": "f", "call_id": "x"}]},
            "input[0].arguments",
            "input[0].arguments is required",
        ),
        (RESPONSES, {"input": [{"role": "user"}]}, "input[0].content", None),
        (RESPONSES, {"input": [{"type": "message"}]}, "input[0].content", None),
        (
            RESPONSES,
            {"input": [{"role": "wizard", "content": "x"}]},
            "input[0].role",
            "input[0].role must be 'user', 'assistant', 'system' or 'developer'",
        ),
        (RESPONSES, {"tools": 5}, "tools", "tools must be an array"),
        (RESPONSES, {"truncation": "?"}, "truncation", "truncation must be 'auto' or 'disabled'"),
    ],
    ids=lambda value: ascii(value)[:70],
)
def test_the_sentence(path: str, fields: dict[str, Any], param: str, message: str) -> None:
    error = refused(path, fields)
    if param is None:
        assert error is None
        return
    assert error is not None
    assert error.status_code == 400
    assert error.param == param
    assert message is None or error.detail == message


def test_every_refusal_is_one_short_line() -> None:
    refusals = [error for path, fields in FIELDS if (error := refused(path, fields)) is not None]
    assert len(refusals) > 50
    for error in refusals:
        assert "\n" not in error.detail
        assert len(error.detail) <= 400
        assert not any(word in error.detail for word in ("ydantic", "type=", "Input should"))


def test_any_number_of_errors_is_refused_at_once() -> None:
    for field, value, message in (
        ("allowed_token_ids", [{}] * 200_000, "allowed_token_ids[0] must be an integer"),
        ("logit_bias", dict.fromkeys(map(str, range(200_000)), "x"), "more than 10000 errors"),
    ):
        begun = time.process_time()
        error = refused(CHAT, {field: value})
        assert time.process_time() - begun < 5
        assert error is not None
        assert message in error.detail


def test_a_beam_search_takes_one_prompt() -> None:
    several: list[Any] = [["a", "b"], [[1], [2]]]
    one: list[Any] = ["a", ["a"], [1, 2]]
    for prompt in several:
        error = refused(TEXT, {"prompt": prompt, "use_beam_search": True, "max_tokens": 2})
        assert error is not None
        assert "one prompt" in error.detail
    for prompt in one:
        assert refused(TEXT, {"prompt": prompt, "use_beam_search": True}) is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_that_validators_read_too_early_are_named(path: str) -> None:
    error = refused(path, {"structured_outputs": "x"})
    assert error is not None
    assert error.param == "structured_outputs"
    assert error.detail.startswith("structured_outputs must be ")
