# SPDX-License-Identifier: Apache-2.0
"""Grammars that would take the engine's memory: repetitions are bounded before it compiles them.

vLLM's grammar compilers unroll what a schema counts: `"minItems": 1000000000`, in a request of a
few hundred bytes, took 12 GB (vLLM 0.32), or 90 bytes for each in the compiler that `auto` falls
back to. Nested counts multiply, and those side by side add up. Can go when vLLM bounds them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import GatewayError

MAX_REPETITIONS = 500_000
"""Of all grammars of a request together."""

# Where requests carry schemas, regular expressions and grammars.
_FIELDS = ("response_format", "structured_outputs", "tools", "text")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# In a string: a repetition of a regular expression or a grammar (`{2,5}`, Lark's `~ 2..5`), or a
# count in what is JSON only to others.
# Possessive, so that a client can't make the search itself take long.
_IN_TEXT = re.compile(
    r"\{\s*+(\d++)?\s*+,?\s*+(\d++)?\s*+\}"
    r"|~\s*+(\d++)(?:\s*+\.\.\s*+(\d++))?"
    rf'|"(?:{"|".join(_COUNTS)})"\s*+:\s*+(\d++)'
)


def check_repetitions(body: Any) -> None:
    """Raise a GatewayError (400) for a grammar that repeats something too often."""
    if isinstance(body, dict):
        total = 0.0
        for field in _FIELDS:
            if field in body:
                total += _repetitions(field, body[field], MAX_REPETITIONS - total)


def _repetitions(field: str, value: Any, limit: float) -> float:
    total = 0.0
    # With how often what holds a value is repeated. A list, for JSON may nest deeply.
    left: list[tuple[Any, float]] = [(value, 1)]
    while left:
        node, times = left.pop()
        if isinstance(node, str):
            schema = _as_json(node, field)
            if schema is not None:
                left.append((schema, times))
            else:
                total += times * sum(map(_times, _IN_TEXT.findall(node)))
        elif isinstance(node, list):
            left += [(value, times) for value in node]
        elif isinstance(node, dict):
            counts = [node[name] for name in _COUNTS if isinstance(node.get(name), int | float)]
            if counts:
                times *= max([1, *counts])
                total += times
            left += [(value, times) for value in node.values()]
        if total > limit:
            raise GatewayError(
                400,
                f"{field} asks for more than {MAX_REPETITIONS} repetitions: nested ones "
                "multiplied, others added up",
                reason="grammar",
                param=field,
            )
    return total


def _times(numbers: tuple[str, ...]) -> float:
    # Digits are counted first: int() takes long for many.
    return max((int(n) if len(n) < 10 else 1e10) for n in numbers if n) if any(numbers) else 0


def _as_json(text: str, field: str) -> Any:
    """A schema that came as text, as compilers read it; None for anything else."""
    if not text.lstrip().startswith("{"):
        return None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # compilers may not agree about which one counts
            text = f"{field} has a schema that gives a key twice"
            raise GatewayError(400, text, reason="grammar", param=field)
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        text = f"{field} has a schema that nests too deeply"
        raise GatewayError(400, text, reason="grammar", param=field) from None
    except ValueError:
        return None
