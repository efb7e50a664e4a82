# SPDX-License-Identifier: Apache-2.0
"""Answers of the Responses API have the fields and types of the Open Responses specification.

The classes are our own reading of what https://www.openresponses.org publishes: fields that must be
there, and what they may be. Fields beyond those are allowed.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.gateway.clients import DATA_URL, ROOM, Paint, tool
from tests.gateway.support import post
from tests.servers import Server


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Logprob(_Strict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class OutputText(_Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class Message(_Strict):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(_Strict):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


Item = Annotated[Message | FunctionCall, Field(discriminator="type")]


class Tool(_Strict):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class Format(_Strict):
    type: Literal["text", "json_object", "json_schema"]


class TextField(_Strict):
    format: Format
    verbosity: Literal["low", "medium", "high"] = "medium"


class InputDetails(_Strict):
    cached_tokens: int


class OutputDetails(_Strict):
    reasoning_tokens: int


class Usage(_Strict):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class Incomplete(_Strict):
    reason: str


class Response(_Strict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: Incomplete | None
    model: str
    previous_response_id: None
    instructions: str | None
    output: list[Item]
    error: None
    tools: list[Tool]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: TextField
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: dict[str, Any] | None
    user: str | None
    usage: Usage | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: Literal[False]  # nothing is
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


class Event(_Strict):
    """What any event has, and the objects that some have."""

    type: str
    sequence_number: int
    response: Response | None = None
    item: Item | None = None
    part: OutputText | None = None


_OF_ITEM = {"item_id": str, "output_index": int}
_OF_PART = {**_OF_ITEM, "content_index": int}
EVENTS: dict[str, dict[str, type]] = {
    "response.created": {"response": dict},
    "response.in_progress": {"response": dict},
    "response.completed": {"response": dict},
    "response.incomplete": {"response": dict},
    "response.output_item.added": {"item": dict, "output_index": int},
    "response.output_item.done": {"item": dict, "output_index": int},
    "response.content_part.added": {"part": dict, **_OF_PART},
    "response.content_part.done": {"part": dict, **_OF_PART},
    "response.output_text.delta": {"delta": str, "logprobs": list, **_OF_PART},
    "response.output_text.done": {"text": str, "logprobs": list, **_OF_PART},
    "response.function_call_arguments.delta": {"delta": str, **_OF_ITEM},
    "response.function_call_arguments.done": {"arguments": str, **_OF_ITEM},
}

PAINT = {**Paint.model_json_schema(), "additionalProperties": False}
# A random model does not end by itself.
ENDS = {"structured_outputs": {"choice": ["yes", "no"]}, "max_output_tokens": ROOM}
CALL = {
    "tools": [{"type": "function", **tool()["function"]}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": ROOM,
}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


ASKED = message("user", "Is it?")
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"input": [ASKED], **ENDS},
    "string": {"input": "Is it?", **ENDS},
    "system": {"input": [message("system", "Be brief."), ASKED], **ENDS},
    "turns": {"input": [ASKED, message("assistant", "Yes."), ASKED], **ENDS},
    "image": {
        "input": [
            message(
                "user",
                [
                    {"type": "input_text", "text": "Is it?"},
                    {"type": "input_image", "image_url": DATA_URL},
                ],
            )
        ],
        **ENDS,
    },
    "tool": {"input": [ASKED], **CALL},
    "schema": {
        "input": [ASKED],
        "text": {"format": {"type": "json_schema", "name": "paint", "schema": PAINT}},
        "max_output_tokens": ROOM,
    },
    "named": {
        "input": [ASKED],
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "user": "u",
        "instructions": "Be brief.",
        "top_p": 0,
        **ENDS,
    },
    "logprobs": {
        "input": [ASKED],
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        **ENDS,
    },
}


def check(response: Any, request: dict[str, Any]) -> Response:
    """The answer of a request that was completed, if it is as it must be."""
    found = Response.model_validate_json(json.dumps(response))
    assert (found.status, found.incomplete_details) == ("completed", None)
    assert found.completed_at is not None
    assert found.completed_at >= found.created_at
    assert found.output[0].type == ("function_call" if "tools" in request else "message")
    assert found.usage is not None
    for name in ("metadata", "safety_identifier", "prompt_cache_key", "user", "top_logprobs"):
        default = {"metadata": {}, "top_logprobs": 0}.get(name)
        assert getattr(found, name) == request.get(name, default)
    assert found.top_p == request.get("top_p", 1)
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_a_response(server: Server, name: str) -> None:
    request = REQUESTS[name]
    status, _, body = post(server, "/v1/responses", {"model": "tiny", **request})
    assert (status, body["error"]) == (200, None)
    check(body, request)


@pytest.mark.parametrize("name", ["text", "tool", "named"])
def test_the_events_of_a_stream(server: Server, name: str) -> None:
    request = REQUESTS[name]
    events = stream(server, {"model": "tiny", "stream": True, **request})
    last = check(events[-1]["response"], request)
    assert events[-1]["type"] == "response.completed"
    created = Response.model_validate_json(json.dumps(events[0]["response"]))
    assert (created.id, created.status, created.completed_at) == (last.id, "in_progress", None)
    kinds = [event["type"] for event in events]
    if name == "tool":
        assert "response.function_call_arguments.delta" in kinds
        assert "response.function_call_arguments.done" in kinds
    else:
        assert "response.output_text.delta" in kinds


def test_an_incomplete_response(server: Server) -> None:
    body = {"model": "tiny", "input": "Is it?", "max_output_tokens": 2}
    _, _, answer = post(server, "/v1/responses", body)
    found = Response.model_validate_json(json.dumps(answer))
    assert (found.status, found.completed_at) == ("incomplete", None)
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"


def stream(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each checked."""
    request = urllib.request.Request(
        f"{server.url}/v1/responses",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    events = []
    with urllib.request.urlopen(request, timeout=60) as response:
        for block in response.read().decode().strip().split("\n\n"):
            name, _, data = block.partition("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            Event.model_validate_json(json.dumps(event))
            for field, kind in EVENTS[event["type"]].items():
                assert isinstance(event[field], kind)
            events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events
