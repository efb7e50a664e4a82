# SPDX-License-Identifier: Apache-2.0
"""Grammars that would take the engine's memory: repetitions are bounded before it compiles them.

vLLM's grammar compilers unroll what a schema counts: `"minItems": 1000000000`, in a request of a
few hundred bytes, took 12 GB (vLLM 0.32), and in the compiler that `auto` falls back to a
`maxItems` takes 1.2 kB for each, in this process. Nested counts multiply, and those side by side
add up. The compiler after that one, which `patternProperties` leads to, writes an object out once
for each of its optional properties. Can go when vLLM bounds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import GatewayError, Reason

MAX_REPETITIONS = 100_000
"""Of each field that may hold grammars."""

# Where requests carry schemas, regular expressions and grammars.
_FIELDS = ("response_format", "structured_outputs", "tools", "text")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# Of a schema: text or data, which nothing compiles or nothing repeats.
_PROSE = frozenset({"title", "description", "default", "const", "enum", "examples"})
# In a string: a repetition of a regular expression or a grammar (`{2,5}`, Lark's `~ 2..5`), or a
# count in what is JSON only to others.
# Possessive, so that a client can't make the search itself take long.
_IN_TEXT = re.compile(
    r"\{\s*+(\d++)?\s*+,?\s*+(\d++)?\s*+\}"
    r"|~\s*+(\d++)(?:\s*+\.\.\s*+(\d++))?"
    rf'|"(?:{"|".join(_COUNTS)})"\s*+:\s*+(\d++)'
)
_IN_LARK = re.compile(r"%json\s*+")


def check_repetitions(body: Any) -> None:
    """Raise a GatewayError (400) for a grammar that repeats something too often."""
    if isinstance(body, dict):
        for field in _FIELDS:
            if field in body:
                _check(field, body[field])


def _check(field: str, value: Any) -> None:
    repeated = written_out = 0.0
    patterns = False
    # With how often what holds a value is repeated, and how often it is written out. A list, for
    # JSON may nest deeply.
    left: list[tuple[Any, float, float]] = [(value, 1, 1)]
    while left:
        node, times, copies = left.pop()
        if isinstance(node, str):
            written_out += (copies - 1) * len(node)
            schema = _as_json(node, field)
            if schema is not None:
                left.append((schema, times, copies))
            else:
                left += [(schema, times, copies) for schema in _lark_schemas(node, field)]
                repeated += times * sum(map(_times, _IN_TEXT.findall(node)))
        elif isinstance(node, list):
            left += [(value, times, copies) for value in node]
        elif isinstance(node, dict):
            counts = [node[name] for name in _COUNTS if isinstance(node.get(name), int | float)]
            if counts:
                times *= max([1, *counts])
                repeated += times
            patterns |= "patternProperties" in node
            copies *= max(1, _num_optional(node))
            for name, value in node.items():
                written_out += (copies - 1) * len(name)
                if name in _PROSE and isinstance(value, str | list):
                    written_out += (copies - 1) * _length(value)
                else:
                    left.append((value, times, copies))
        if repeated + (written_out if patterns else 0) > MAX_REPETITIONS:
            text = f"{field} asks for more than {MAX_REPETITIONS} repetitions"
            raise _refusal(field, f"{text}: nested ones multiplied, others added up")


def _num_optional(node: dict[str, Any]) -> int:
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict):
        return 0
    named = (n for n in required if isinstance(n, str)) if isinstance(required, list) else ()
    return len(properties.keys() - set(named))


def _length(data: str | list[Any]) -> int:
    """Characters of a text, or of the texts in a list."""
    texts = [data] if isinstance(data, str) else data
    return sum(len(text) if isinstance(text, str) else 8 for text in texts)


def _times(numbers: tuple[str, ...]) -> float:
    # Digits are counted first: int() takes long for many.
    return max((int(n) if len(n) < 10 else 1e10) for n in numbers if n) if any(numbers) else 0


def _as_json(text: str, field: str) -> Any:
    """A schema that came as text, as compilers read it; None for anything else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return _decode(text, field)
    except ValueError:
        return None  # a regular expression, or a grammar


def _lark_schemas(text: str, field: str) -> Iterator[Any]:
    for found in _IN_LARK.finditer(text):
        try:
            yield _decode(text, field, found.end())
        except ValueError:
            raise _refusal(field, f"{field} has %json without JSON") from None


def _decode(text: str, field: str, begin: int | None = None) -> Any:
    """All of a text as JSON, or what begins at `begin`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # compilers may not agree about which one counts
            raise _refusal(field, f"{field} has a schema that gives a key twice")
        return found

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    try:
        return decoder.decode(text) if begin is None else decoder.raw_decode(text, begin)[0]
    except RecursionError:
        raise _refusal(field, f"{field} has a schema that nests too deeply") from None


def _refusal(field: str, text: str) -> GatewayError:
    return GatewayError(400, text, reason=Reason.GRAMMAR, param=field)
