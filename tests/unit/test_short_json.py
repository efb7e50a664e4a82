# SPDX-License-Identifier: Apache-2.0
"""Grammars of the bundled model end, and take nothing that the client's do not take."""

from __future__ import annotations

import json
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
        ({"type": "integer", "minimum": 5}, {"type": "integer", "minimum": 5}),
        (
            {"type": "integer", "minimum": 5, "maximum": 2**64 - 1},
            {"type": "integer", "minimum": 5},
        ),
        ({"type": "array"}, {"type": "array", "items": STRING, "maxItems": MAX_ITEMS}),
        (
            {"type": "array", "minItems": 9, "items": {"$ref": "#/$defs/A"}},
            {"type": "array", "minItems": 9, "maxItems": 9, "items": {"$ref": "#/$defs/A"}},
        ),
        (
            {"properties": {"type": {"type": "string"}, "items": {}}},
            {"properties": {"type": STRING, "items": STRING}, "additionalProperties": False},
        ),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [STRING, {"type": "null"}]}),
        ({"type": "boolean"}, {"type": "boolean"}),
        (True, STRING),
        ({"type": "object", "additionalProperties": False}, ...),
    ],
)
def test_schemas(schema: Any, expected: Any) -> None:
    assert narrowed(schema) == (schema if expected is ... else expected)


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


def test_arguments_are_an_object() -> None:
    tag = {"format": {"type": "json_schema", "json_schema": True}}
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
