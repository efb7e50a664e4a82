# SPDX-License-Identifier: Apache-2.0
"""Grammars that repeat something too often never reach vLLM's compilers."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from himap_server.errors import GatewayError
from himap_server.security.grammars import MAX_REPETITIONS, MAX_TEXT, check_repetitions


def schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": fields}}}


def deep(levels: int) -> Any:
    node: Any = {}
    for _ in range(levels):
        node = {"items": node}
    return node


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (schema(minItems=10**9), "response_format"),
        (schema(maxLength=1e9), "response_format"),
        (
            schema(minItems=1000, items={"minItems": 1000}),
            "response_format",
        ),
        (
            schema(minItems=1000, items={"pattern": "a{1000}"}),
            "response_format",
        ),
        ({"structured_outputs": {"regex": "(ab){2,999999}"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a{" + "9" * 5000 + "}"}}, "structured_outputs"),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"{999999,}'}},
            "structured_outputs",
        ),
        (
            {"structured_outputs": {"json": json.dumps({"minItems": 10**9})}},
            "structured_outputs",
        ),
        (
            {"structured_outputs": {"json": '{"min\\u0049tems": 1000000000}'}},
            "structured_outputs",
        ),
        (
            {"structured_outputs": {"structural_tag": json.dumps({"a": '{"maxLength": 1e9}'})}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"json": '{"minItems": 1000000000} x'}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'start: "a" ~ 1..999999'}}, "structured_outputs"),
        (schema(allOf=[{"maxItems": MAX_REPETITIONS // 50}] * 51), "response_format"),
        ({"structured_outputs": {"regex": "a{9999}" * 51}}, "structured_outputs"),
        (
            {"structured_outputs": {"grammar": 'x: %json\n{"min\\u0049tems": 1000000000}'}},
            "structured_outputs",
        ),
        (
            {
                "structured_outputs": {
                    "grammar": 'x: %json {"maxItems": 999, "items": {"maxItems": 999}}'
                }
            },
            "structured_outputs",
        ),
        (
            schema(
                required=[f"x{i}" for i in range(200)],
                patternProperties={},
                properties={f"p{i}": {"enum": ["x" * 9]} for i in range(200)},
            ),
            "response_format",
        ),
        (
            schema(
                allOf=[{"patternProperties": {}}],
                properties={
                    f"p{i}": schema(properties={f"q{i}": {"type": "string"} for i in range(30)})
                    for i in range(30)
                },
            ),
            "response_format",
        ),
        (
            {"tools": [{"function": {"parameters": {"minProperties": 10**9}}}]},
            "tools",
        ),
        ({"text": {"format": {"schema": {"minLength": 10**9}}}}, "text"),
    ],
)
def test_bombs(body: dict[str, Any], param: str) -> None:
    with pytest.raises(GatewayError, match=f"more than {MAX_REPETITIONS} repetitions") as error:
        check_repetitions(body)
    assert (error.value.status_code, error.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        schema(minItems=3, maxItems=MAX_REPETITIONS, items={"type": "integer", "minimum": 10**9}),
        schema(properties={"minItems": {"type": "integer"}}),
        {"structured_outputs": {"regex": r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"}},
        {"messages": [{"role": "user", "content": "What does a{999999} match?"}]},
        {"tools": None},
        [],
        {"structured_outputs": {"json": json.dumps({"pattern": "^{", "maxLength": 5000})}},
        {"structured_outputs": {"regex": r"{\d{3}"}},
        schema(properties={str(i): {"maxLength": 1000} for i in range(99)}),
        schema(properties={"description": {"type": "string"}, "enum": {"minItems": 2}}),
        schema(patternProperties={"^x": {"type": "string"}}, properties={"a": {}, "b": {}}),
        schema(properties={f"p{i}": {"type": "string"} for i in range(2000)}),
        {
            "tools": [
                {"function": {"description": 'Over ~1500000 people, or {"a": 1, "a": {9999999}}'}}
            ]
        },
        {
            "tools": [
                {"function": {"parameters": {"examples": ["~ 9999999"], "default": "a{999999}"}}}
            ]
        },
        schema(items=deep(20_000)),
    ],
)
def test_others_pass(body: Any) -> None:
    check_repetitions(body)


@pytest.mark.parametrize(
    "text",
    [
        '{"maxItems": 1, "maxItems": 1000000000}',
        '{"items":' * 20_000 + "1" + "}" * 20_000,
        "start: %json {'minItems': 1}",
    ],
)
def test_schemas_as_text_that_are_read_differently(text: str) -> None:
    with pytest.raises(GatewayError, match=r"structured_outputs has (a schema|%json)") as error:
        check_repetitions({"structured_outputs": {"json": text}})
    assert error.value.status_code == 400


@pytest.mark.parametrize(
    "text",
    [
        "{" + " " * 250_000,
        "{ " * 125_000,
        "{" + "1" * 250_000,
        '"minItems"' + " " * 250_000,
        '"minItems" :' * 20_000,
    ],
    ids=range(5),
)
def test_the_search_itself_is_quick(text: str) -> None:
    """A backtracking search would take hours for the first."""
    check_repetitions({"structured_outputs": {"regex": text}})


def test_deep_and_wide() -> None:
    """Naming every place would take memory by depth times width."""
    node: Any = [0] * 100_000
    for _ in range(500):
        node = {"x" * 1000: node}
    check_repetitions({"tools": node})


@pytest.mark.parametrize("piece", ["{1}", "{", "~ 1", "a"])
def test_a_text_of_megabytes_is_not_searched(piece: str) -> None:
    text = piece * (2 * MAX_TEXT // len(piece))
    with pytest.raises(GatewayError, match=f"of more than {MAX_TEXT} characters"):
        check_repetitions({"structured_outputs": {"regex": text}})


def test_a_search_ends_at_the_limit() -> None:
    """A list of all repetitions would take a hundred bytes for each character."""
    text = "{9}" * (MAX_TEXT // 3)
    tracemalloc.start()
    with pytest.raises(GatewayError, match="repetitions"):
        check_repetitions({"structured_outputs": {"regex": text}})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_TEXT
