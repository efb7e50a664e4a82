# SPDX-License-Identifier: Apache-2.0
"""Grammars for the bundled model, narrowed so that what it writes comes to an end.

It was trained on descriptions of pictures. Inside JSON it never chooses a closing quote, so strings
get a length, numbers bounds, lists a number of items, and objects no properties that nobody asked
for. Whatever the narrower schema takes, the client's takes, too. Patterns, `allOf` of several
schemas, and schemas that contain themselves stay as they are, and may not come to an end.

Structural tags, which calls of tools have, allow white space around JSON whatever vLLM's
`disable_any_whitespace` says. So their schemas are replaced by grammars without.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import count, islice
from typing import Any

import xgrammar
from vllm.sampling_params import StructuredOutputsParams

MAX_CHARACTERS = 48
MAX_ITEMS = 4
MAX_INTEGER = 999
MAX_PROPERTIES = 64  # that a schema wants, without naming them

_LARGE_INTEGER = 2**62

_STRING = {"type": "string", "maxLength": MAX_CHARACTERS}
_JSON_MODE = {
    "type": "object",
    "properties": {"answer": _STRING},
    "required": ["answer"],
    "additionalProperties": False,
}
# A string with one of these cannot have a length beside them, or has one.
_OF_STRINGS = ("maxLength", "pattern", "format")
_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMAS = ("items", "anyOf", "oneOf", "prefixItems")
_FIXED = ("enum", "const", "$ref", "allOf", "anyOf", "oneOf")
# What a schema without a type is about.
_KINDS = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "integer": (*_LOWER, *_UPPER),
}
_NAMED = ("patternProperties", "propertyNames")


def shorten(params: StructuredOutputsParams) -> None:
    """Narrow the JSON of a request's grammar.

    Regular expressions and choices stay as they are. So do schemas that break the rules of JSON
    Schema: vLLM refuses them.
    """
    with suppress(TypeError, ValueError, RuntimeError, RecursionError):
        _shorten(params)


def _shorten(params: StructuredOutputsParams) -> None:
    if params.json_object:
        params.json_object, params.json = None, json.dumps(_JSON_MODE)
    elif params.json is not None:
        schema = json.loads(params.json) if isinstance(params.json, str) else params.json
        params.json = json.dumps(narrowed(schema))
    elif params.structural_tag is not None:
        params.structural_tag = json.dumps(_narrowed_tag(json.loads(params.structural_tag)))


def narrowed(schema: Any) -> Any:
    """A schema of which every text is short. It takes nothing that `schema` does not take."""
    if schema is True or schema == {}:
        return _STRING
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in _SCHEMAS_BY_NAME:
        if isinstance(found.get(name), dict):
            found[name] = {key: narrowed(value) for key, value in found[name].items()}
    for name in _SCHEMAS:
        value = found.get(name)
        if isinstance(value, list):
            found[name] = [narrowed(item) for item in value]
        elif value is not None:
            found[name] = narrowed(value)
    every = found.get("allOf")
    if isinstance(every, list) and len(every) == 1:
        found["allOf"] = [narrowed(every[0])]
    if any(name in found for name in _FIXED):
        return found
    if "type" not in found:
        about = (kind for kind, names in _KINDS.items() if any(name in found for name in names))
        found["type"] = next(about, "string")
    kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
    if "string" in kinds and not any(name in found for name in _OF_STRINGS):
        found["maxLength"] = max(MAX_CHARACTERS, found.get("minLength", 0))
    if "integer" in kinds or "number" in kinds:
        _bound_number(found)
    if "array" in kinds:
        least = max(found.get("minItems", 0), len(found.get("prefixItems", ())))
        found.setdefault("maxItems", max(MAX_ITEMS, least))
        found.setdefault("items", _STRING)
    if "object" in kinds:
        _close_object(found)
    return found


def _bound_number(schema: dict[str, Any]) -> None:
    """Leave out what xgrammar can't count to, and give a number without bounds few digits."""
    kinds: Any = "integer"
    if isinstance(schema["type"], list):
        kinds = ["integer" if kind == "number" else kind for kind in schema["type"]]
    if not any(name in schema for name in (*_LOWER, *_UPPER)):  # it may have any fraction
        schema["type"] = kinds
    for name in (*_LOWER, *_UPPER):
        bound = schema.get(name, 0)
        # The other way round nothing is left to count, and the refusal is right.
        if abs(bound) >= _LARGE_INTEGER and (bound > 0) == (name in _UPPER):
            del schema[name]
    lower = [schema[name] for name in _LOWER if name in schema]
    upper = [schema[name] for name in _UPPER if name in schema]
    span = min(MAX_INTEGER * max(1, schema.get("multipleOf", 1)), _LARGE_INTEGER)
    if not lower:
        schema["minimum"] = min(upper) - span if upper else 0
    if not upper:
        schema["maximum"] = max(lower) + span if lower else span


def _close_object(schema: dict[str, Any]) -> None:
    """Leave the properties that have a name, and name those that there must be."""
    more = schema.get("additionalProperties", True)
    if more is False:
        return
    properties = dict(schema.get("properties", {}))
    if schema.get("minProperties", 0) > MAX_PROPERTIES:
        return  # their names would be long
    if not any(name in schema for name in _NAMED):
        value = narrowed(more)
        for name in schema.get("required", ()):
            properties.setdefault(name, value)
        missing = schema.get("minProperties", 0) - len(properties)
        others = (name for name in map("property{}".format, count(1)) if name not in properties)
        properties.update(dict.fromkeys(list(islice(others, max(0, missing))), value))
    if properties:
        schema["properties"] = properties
    schema["additionalProperties"] = False


def _narrowed_tag(node: Any) -> Any:
    """A structural tag, or a part of it."""
    if isinstance(node, list):
        return [_narrowed_tag(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") != "json_schema" or "json_schema" not in node:
        return {key: _narrowed_tag(value) for key, value in node.items()}
    schema = node["json_schema"]
    # Arguments of a tool are an object, also where the tool's schema does not say so.
    if schema is True or not any(name in schema for name in ("type", *_FIXED)):
        schema = {**({} if schema is True else schema), "type": "object"}
    schema = json.dumps(narrowed(schema))
    grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False)
    return {"type": "grammar", "grammar": str(grammar)}
