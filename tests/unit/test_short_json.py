# SPDX-License-Identifier: Apache-2.0
"""Grammars of the bundled model end, and take nothing that the client's do not take."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import xgrammar
from himap_server.short_json import MAX_CHARACTERS, MAX_ITEMS, narrowed, shorten
from vllm.sampling_params import StructuredOutputsParams

STRING = {"type": "string", "maxLength": MAX_CHARACTERS}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, STRING),
        ({"type": ["string", "null"]}, {"type": ["string", "null"], "maxLength": MAX_CHARACTERS}),
        ({"type": "string", "maxLength": 900}, {"type": "string", "maxLength": 900}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"type": "string", "enum": ["a"]}, {"type": "string", "enum": ["a"]}),
        ({"type": "integer"}, {"type": "integer", "minimum": 0, "maximum": 999}),
        ({"type": "string", "minLength": 9}, {**STRING, "minLength": 9}),
        ({"type": "string", "minLength": 99}, {"type": "string", "minLength": 99, "maxLength": 99}),
        (
            {"type": "integer", "minimum": 5, "maximum": 2**64 - 1},
            {"type": "integer", "minimum": 5, "maximum": 1004},
        ),
        (
            {"type": "integer", "exclusiveMaximum": -5},
            {"type": "integer", "exclusiveMaximum": -5, "minimum": -1004},
        ),
        (
            {"type": "integer", "multipleOf": 7},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 6993},
        ),
        ({"type": "number"}, {"type": "integer", "minimum": 0, "maximum": 999}),
        (
            {"type": ["number", "null"]},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 999},
        ),
        (
            {"type": "number", "minimum": 0.5},
            {"type": "number", "minimum": 0.5, "maximum": 999.5},
        ),
        ({"type": "number", "minimum": 0, "maximum": 1}, ...),
        ({"description": "anything"}, {"description": "anything", **STRING}),
        ({"allOf": [{"type": "string"}]}, {"allOf": [STRING]}),
        ({"type": "array"}, {"type": "array", "items": STRING, "maxItems": MAX_ITEMS}),
        (
            {"type": "array", "minItems": 9, "items": {"$ref": "#/$defs/A"}},
            {"type": "array", "minItems": 9, "maxItems": 9, "items": {"$ref": "#/$defs/A"}},
        ),
        (
            {"properties": {"type": {"type": "string"}, "items": {}}},
            {
                "type": "object",
                "properties": {"type": STRING, "items": STRING},
                "additionalProperties": False,
            },
        ),
        (
            {"type": "array", "prefixItems": [{"type": "null"}] * 6, "items": False},
            {"type": "array", "prefixItems": [{"type": "null"}] * 6, "items": False, "maxItems": 6},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "string"}},
            {"type": "object", "additionalProperties": False},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
            {
                "type": "object",
                "properties": {"property1": {"type": "null"}, "property2": {"type": "null"}},
                "additionalProperties": False,
                "minProperties": 2,
            },
        ),
        (
            {"properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": STRING},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        ),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, ...),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [STRING, {"type": "null"}]}),
        ({"type": "boolean"}, {"type": "boolean"}),
        (True, STRING),
        ({"type": "object", "additionalProperties": False}, ...),
    ],
)
def test_schemas(schema: Any, expected: Any) -> None:
    assert narrowed(schema) == (schema if expected is ... else expected)


@pytest.mark.parametrize(
    ("schema", "ends", "goes_on"),
    [
        ({"type": "string", "minLength": 60}, f'"{"a" * 60}"', '"' + "a" * 61),
        ({"type": "integer", "minimum": 1}, "1000", "10000"),
        ({"type": "integer", "maximum": 7}, "-992", "-9920"),
        ({"type": "number"}, "999", "9.9"),
        ({"type": "number", "minimum": 1}, "1000.0", "10000"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{}", '{"'),
        ({"required": ["a"]}, '{"a": "b"}', '{"a": "b", '),
        ({"type": "object", "minProperties": 1}, '{"property1": "b"}', '{"property1": "b", '),
        ({"allOf": [{"type": "integer"}]}, "999", "9999"),
        ({"title": "anything"}, '"a"', "["),
    ],
)
def test_what_is_written_ends(schema: Any, ends: str, goes_on: str) -> None:
    grammar = xgrammar.Grammar.from_json_schema(json.dumps(narrowed(schema)), any_whitespace=False)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([chr(c) for c in range(128)]))
    matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(grammar))
    assert matcher.accept_string(ends)
    assert matcher.is_completed()
    matcher.reset()
    assert not matcher.accept_string(goes_on)


def test_calls_of_tools_have_no_white_space() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": "<call>",
            "content": {"type": "json_schema", "json_schema": schema},
            "end": "</call>",
        },
    }
    params = StructuredOutputsParams(structural_tag=json.dumps(tag))
    shorten(params)
    assert params.structural_tag is not None
    grammar = xgrammar.Grammar.from_structural_tag(params.structural_tag)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([chr(c) for c in range(128)]))

    def is_taken(text: str) -> bool:
        return xgrammar.GrammarMatcher(compiler.compile_grammar(grammar)).accept_string(text)

    assert is_taken('<call>{"a": "b c"}</call>')
    assert not is_taken('<call>{ "a": "b c"}</call>')
    assert not is_taken('<call>{"a": "' + "b" * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("schema", [True, {}, {"description": "none"}])
def test_arguments_are_an_object(schema: Any) -> None:
    tag = {"format": {"type": "json_schema", "json_schema": schema}}
    params = StructuredOutputsParams(structural_tag=json.dumps(tag))
    shorten(params)
    assert params.structural_tag is not None
    grammar = json.loads(params.structural_tag)["format"]["grammar"]
    assert 'root ::= (("{" "}"))' in grammar


def test_json_mode() -> None:
    params = StructuredOutputsParams(json_object=True)
    shorten(params)
    assert params.json_object is None
    assert isinstance(params.json, str)
    assert json.loads(params.json)["properties"] == {"answer": STRING}
    choice = StructuredOutputsParams(choice=["a"])
    shorten(choice)
    assert choice == StructuredOutputsParams(choice=["a"])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": "x"},
        {"type": "array", "minItems": "a"},
        {"type": "array", "prefixItems": 3},
        {"type": "object", "required": 5},
        {"type": "object", "properties": 5},
        {"type": "string", "minLength": []},
    ],
)
@pytest.mark.parametrize("in_tag", [False, True])
def test_a_schema_that_breaks_the_rules_stays_as_it_is(schema: Any, in_tag: bool) -> None:
    tag = {"format": {"type": "json_schema", "json_schema": schema}}
    params = StructuredOutputsParams(
        json=None if in_tag else schema, structural_tag=json.dumps(tag) if in_tag else None
    )
    before = replace(params)
    shorten(params)
    assert params == before
