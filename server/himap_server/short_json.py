# SPDX-License-Identifier: Apache-2.0
"""Grammars for the bundled model, narrowed so that what it writes comes to an end.

It was trained on descriptions of pictures. Inside JSON it never chooses a closing quote, so strings
get a length, lists a number of items, and objects no properties that nobody asked for. Whatever
the narrower grammar takes, the client's takes, too.

Structural tags, which calls of tools have, allow white space around JSON whatever vLLM's
`disable_any_whitespace` says. So their schemas are replaced by grammars without.
"""

from __future__ import annotations

import json
from typing import Any

import xgrammar
from vllm.sampling_params import StructuredOutputsParams

MAX_CHARACTERS = 48
MAX_ITEMS = 4
MAX_INTEGER = 999

_LARGE_INTEGER = 2**62

_STRING = {"type": "string", "maxLength": MAX_CHARACTERS}
_JSON_MODE = {
    "type": "object",
    "properties": {"answer": _STRING},
    "required": ["answer"],
    "additionalProperties": False,
}
# A string with one of these is as long as they say, or cannot have a length beside them.
_OF_STRINGS = ("maxLength", "minLength", "pattern", "format")
_OF_INTEGERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMAS = ("items", "anyOf", "oneOf", "prefixItems")
_FIXED = ("enum", "const", "$ref", "allOf", "anyOf", "oneOf")


def shorten(params: StructuredOutputsParams) -> None:
    """Narrow the JSON of a request's grammar. Regular expressions and choices stay as they are."""
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
    if any(name in found for name in _FIXED):
        return found
    kinds = found.get("type", "object" if "properties" in found else None)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and not any(name in found for name in _OF_STRINGS):
        found["maxLength"] = MAX_CHARACTERS
    if "integer" in kinds:
        _bound_integer(found)
    if "array" in kinds:
        found.setdefault("maxItems", max(MAX_ITEMS, found.get("minItems", 0)))
        found.setdefault("items", _STRING)
    if "object" in kinds and found.get("additionalProperties", True) in (True, {}):
        found["additionalProperties"] = False
    return found


def _bound_integer(schema: dict[str, Any]) -> None:
    """Leave out what xgrammar can't count to, and give an integer without bounds few digits."""
    for name in _OF_INTEGERS:
        bound = schema.get(name, 0)
        # The other way round nothing is left to count, and the refusal is right.
        is_upper = "max" in name.lower()
        if abs(bound) >= _LARGE_INTEGER and (bound > 0) == is_upper:
            del schema[name]
    if not any(name in schema for name in _OF_INTEGERS):
        schema.update(minimum=0, maximum=MAX_INTEGER)


def _narrowed_tag(node: Any) -> Any:
    """A structural tag, or a part of it."""
    if isinstance(node, list):
        return [_narrowed_tag(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") != "json_schema" or "json_schema" not in node:
        return {key: _narrowed_tag(value) for key, value in node.items()}
    schema = node["json_schema"]
    # Arguments of a tool are an object, also where the tool has no schema.
    schema = json.dumps(narrowed({"type": "object"} if schema in (True, {}) else schema))
    grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False)
    return {"type": "grammar", "grammar": str(grammar)}
