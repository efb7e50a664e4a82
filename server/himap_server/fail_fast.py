# SPDX-License-Identifier: Apache-2.0
"""Validation that stops at the first wrong item of each list.

Pydantic reports every wrong item, once for each type that it could have had: a body of 300 kB made
half a million errors, in one call that holds the interpreter for a minute, and gigabytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import CoreSchema, SchemaValidator

_LISTS = frozenset({"list", "tuple", "set", "frozenset"})


@cache
def validator_of(model: type[BaseModel]) -> SchemaValidator:
    """The `fail_fast` validator of a model."""
    return fail_fast(model.__pydantic_core_schema__)


def fail_fast(schema: CoreSchema) -> SchemaValidator:
    """A validator with `fail_fast` for all lists of a schema.

    Pydantic has the option for types that are written `Annotated[list[...], FailFast()]`; those of
    vLLM and OpenAI are not.
    """
    # Validators that nested models have already would be taken as they are.
    return SchemaValidator(_with_fail_fast(schema, {}), _use_prebuilt=False)


def _with_fail_fast(node: Any, copies: dict[int, Any]) -> Any:
    """A copy of a core schema; parts that it has several times stay shared."""
    if isinstance(node, list | tuple):
        return type(node)(_with_fail_fast(item, copies) for item in node)
    if not isinstance(node, dict):
        return node
    if id(node) not in copies:
        copy = copies[id(node)] = {}
        copy.update((key, _with_fail_fast(value, copies)) for key, value in node.items())
        kind = node.get("type")
        if isinstance(kind, str) and kind in _LISTS and "items_schema" in node:
            copy["fail_fast"] = True
    return copies[id(node)]
