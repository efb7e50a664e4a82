# SPDX-License-Identifier: Apache-2.0
"""A null is the default of every optional field of the three APIs, and of what fields hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from himap_server.schemas import ChatRequest, ResponsesBody, TextRequest
from pydantic import BaseModel

BODIES: dict[type[BaseModel], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "hi"}]},
    TextRequest: {"prompt": "hi"},
    ResponsesBody: {"input": "hi"},
}
_NOT_COMPARED = {"request_id"}  # new each time
FIELDS = [
    (model, field.alias or name)
    for model, body in BODIES.items()
    for name, field in model.model_fields.items()
    if name not in body
]


def values(model: type[BaseModel], body: Any) -> dict[str, Any]:
    """What the engine gets of a body."""
    found = model.model_validate(copy.deepcopy(body), from_attributes=True)
    return found.model_dump(exclude=_NOT_COMPARED, warnings=False)


@pytest.mark.parametrize(
    ("model", "name"), FIELDS, ids=[f"{model.__name__}-{name}" for model, name in FIELDS]
)
def test_null_is_the_default_of_a_field(model: type[BaseModel], name: str) -> None:
    body = {"model": "m", **BODIES[model]}
    expected = values(model, {key: value for key, value in body.items() if key != name})
    assert values(model, {**body, name: None}) == expected


def _fill(node: Any, spots: list[str], path: str = "") -> Any:
    """A copy with `None` in place of every optional value that is named `?...`."""
    if isinstance(node, dict):
        for key in node:
            if key.startswith("?"):
                spots.append(f"{path}.{key[1:]}")
        return {
            key.lstrip("?"): _fill(value, spots, f"{path}.{key}") for key, value in node.items()
        }
    if isinstance(node, list):
        return [_fill(value, spots, path) for value in node]
    return node


_URL = "data:image/png;base64,AAAA"
_TAG = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"const": None}}}
_TOOL = {"type": "object", "properties": {"a": {"default": None, "enum": [None, 1]}}}


def test_schemas_of_structural_tags_keep_their_nulls() -> None:
    body = {**BODIES[ChatRequest], "response_format": copy.deepcopy(_TAG)}
    found = values(ChatRequest, body)["response_format"]
    assert found["format"]["json_schema"] == {"const": None}


NESTED: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, {"messages": [{"role": "user", "content": "hi", "?name": None}]}),
    (
        ChatRequest,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": _URL, "?detail": None},
                            "?uuid": None,
                        }
                    ],
                },
                {
                    "role": "assistant",
                    "content": "yes",
                    **{"?refusal": None, "?tool_calls": None, "?audio": None, "?name": None},
                    "?function_call": None,
                },
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        **{"name": "f", "parameters": _TOOL},
                        **{"?description": None, "?strict": None},
                    },
                }
            ],
            "stream": True,
            "stream_options": {"include_usage": True, "?continuous_usage_stats": None},
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": _TOOL,
                    "?strict": None,
                    "?description": None,
                },
            },
            "himap": {"?enabled": None, "?shallow_ratio": None, "deep_ratio": 0.5},
        },
    ),
    (
        ResponsesBody,
        {
            "input": [
                {
                    "role": "user",
                    "?type": None,
                    "?status": None,
                    "content": [
                        {
                            **{"type": "input_image", "image_url": _URL, "detail": "auto"},
                            "?file_id": None,
                        },
                        {"type": "input_text", "text": "hi"},
                    ],
                }
            ],
            "reasoning": {"effort": "low", "?summary": None, "?generate_summary": None},
            "text": {"?verbosity": None, "?format": None},
        },
    ),
]


@pytest.mark.parametrize(("model", "body"), NESTED)
def test_null_inside_a_field(model: type[BaseModel], body: dict[str, Any]) -> None:
    spots: list[str] = []
    given = _fill(body, spots)
    assert spots

    def without(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: without(value) for key, value in node.items() if key[0] != "?"}
        return [without(value) for value in node] if isinstance(node, list) else node

    assert _plain(values(model, given)) == _plain(values(model, without(body)))


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, str | bytes | int | float | None):
        return node
    return [_plain(value) for value in node]


def test_a_null_of_the_clients_own_stays() -> None:
    model, body = NESTED[1]
    found = values(model, _fill(body, []))
    assert found["tools"][0]["function"]["parameters"] == _TOOL
