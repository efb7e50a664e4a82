# SPDX-License-Identifier: Apache-2.0
"""Errors of vLLM name the field as the client wrote it, and numbers are never too large."""

from __future__ import annotations

import json
from typing import Any

import pytest
from himap_server.error_fields import field_of
from himap_server.errors import GatewayError
from himap_server.routes.body import _load, _validate
from himap_server.schemas import ChatRequest, ResponsesBody, TextRequest
from pydantic import BaseModel
from vllm.exceptions import VLLMValidationError

from tests.gateway.hostile import CHAT, GOOD, OUT_OF_RANGE, RESPONSES, TEXT

SCHEMAS: dict[str, type[BaseModel]] = {
    CHAT: ChatRequest,
    TEXT: TextRequest,
    RESPONSES: ResponsesBody,
}
LARGE = {
    "above": str(2**63), "below": str(-(2**63) - 1), "far": str(2**70), "far-below": str(-(2**70)),
    "double": "1e400", "double-below": "-1e400", "digits": "9" * 5000,
    "some digits": "9" * 1000,
}  # fmt: skip
INTEGER = "an integer in [-9223372036854775808, 9223372036854775807]"


def refused(path: str, body: str) -> tuple[str | None, str]:
    """`param` and message of what validation or vLLM's sampling parameters refuse."""
    model = SCHEMAS[path]
    try:
        found: Any = _validate(model, _load(body.encode()))
    except GatewayError as error:
        return error.param, str(error.detail)
    try:
        found.to_sampling_params(16, {})
    except VLLMValidationError as error:
        message = error.args[0]
        return field_of(message, error.parameter, model, found.model_fields_set), message
    return None, ""


def body_with(path: str, field: str, literal: str) -> str:
    good = {key: value for key, value in GOOD[path].items() if key != field}
    return f'{json.dumps(good)[:-1]}, "{field}": {literal}}}'


@pytest.mark.parametrize(
    ("path", "fields", "param"), OUT_OF_RANGE, ids=lambda value: ascii(value)[:60]
)
def test_vllms_range_checks_name_the_field(path: str, fields: dict[str, Any], param: str) -> None:
    found, message = refused(path, json.dumps({**GOOD[path], **fields}))
    if message:  # others know the model
        assert found == param


@pytest.mark.parametrize("digits", LARGE.values(), ids=LARGE)
def test_a_ratio_of_any_size_is_told_its_range(digits: str) -> None:
    wanted = "greater than or equal to 0" if digits[0] == "-" else "less than 1"
    for path in GOOD:
        for field in ("shallow_ratio", "deep_ratio"):
            answer = refused(path, body_with(path, "himap", f'{{"{field}": {digits}}}'))
            assert answer == (f"himap.{field}", f"himap.{field} must be {wanted}")


@pytest.mark.parametrize("digits", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (CHAT, "top_k"), (CHAT, "max_tokens"), (CHAT, "max_completion_tokens"),
        (CHAT, "min_tokens"), (CHAT, "truncate_prompt_tokens"),
        (TEXT, "max_tokens"), (TEXT, "top_k"),
        (RESPONSES, "max_output_tokens"), (RESPONSES, "top_k"), (RESPONSES, "max_tool_calls"),
    ],
)  # fmt: skip
def test_integers_beyond_64_bits(path: str, field: str, digits: str) -> None:
    found, message = refused(path, body_with(path, field, digits))
    assert found == field
    assert "must be" in message
    assert "number with a fraction" not in message


@pytest.mark.parametrize(
    ("path", "field", "literal", "param", "message"),
    [
        (CHAT, "temperature", str(2**70), "temperature", "temperature must be in [0, 2]"),
        (CHAT, "temperature", "1e400", "temperature", "temperature must be in [0, 2]"),
        (CHAT, "top_p", str(2**70), "top_p", "top_p must be in (0, 1]"),
        (CHAT, "temperature", "9" * 1000, "temperature", "temperature must be in [0, 2]"),
        (CHAT, "presence_penalty", "9" * 5000, "presence_penalty", "presence_penalty must be in"),
        (CHAT, "model", str(2**70), "model", "model must be a string"),
        (CHAT, "stream", str(2**70), "stream", "stream must be"),
        (CHAT, "messages", str(2**70), "messages", "messages must be an array"),
        (CHAT, "stop", f"[{2**70}]", "stop[0]", "stop[0] must be a string"),
        (CHAT, "stop_token_ids", f"[1, {2**70}]", "stop_token_ids[1]", INTEGER),
        (CHAT, "top_logprobs", str(2**70), "top_logprobs", ""),
        (TEXT, "prompt", f"[1, {2**70}]", "prompt", ""),
        (TEXT, "logprobs", str(2**70), "logprobs", INTEGER),
        (RESPONSES, "input", str(2**70), "input", "input must be a string or an array"),
    ],
)
def test_a_large_number_is_told_what_its_field_takes(
    path: str, field: str, literal: str, param: str, message: str
) -> None:
    found, text = refused(path, body_with(path, field, literal))
    assert found is not None
    assert found.startswith(param)
    assert message in text


def test_numbers_stay_numbers() -> None:
    """No infinity reaches the engine, or an answer that repeats what was asked."""
    schema = '{"maximum": 1e400, "minimum": -1e400, "a": 18446744073709551615, "b": %s}' % (
        "9" * 400
    )
    body = _load(b'{"logit_bias": {"5": 1e400}, "tools": [%s], "x": -0.0}' % schema.encode())
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["tools"][0]["a"] == 2**64 - 1
    assert (body["x"], str(body["x"])) == (0, "-0.0")
    for literal in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(GatewayError, match="is not JSON"):
            _load(b'{"temperature": %s}' % literal)
