# SPDX-License-Identifier: Apache-2.0
"""Grammars that would take the engine's memory: repetitions are bounded before it compiles them.

vLLM's grammar compilers unroll what a schema counts: `"minItems": 1000000000`, in a request of a
few hundred bytes, took 12 GB (vLLM 0.32). Nested counts multiply. Can go when vLLM bounds them.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import GatewayError

MAX_REPETITIONS = 100_000

# Where requests carry schemas, regular expressions and grammars.
_FIELDS = ("response_format", "structured_outputs", "tools", "text")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# In a string: a repetition of a regular expression or a grammar, or a count in a schema as text.
# Possessive, so that a client can't make the search itself take long.
_IN_TEXT = re.compile(
    r"\{\s*+(\d++)?\s*+,?\s*+(\d++)?\s*+\}"
    rf'|"(?:{"|".join(_COUNTS)})"\s*+:\s*+(\d++)'
)


def check_repetitions(body: Any) -> None:
    """Raise a GatewayError (400) for a grammar that repeats something too often."""
    if isinstance(body, dict):
        for field in _FIELDS:
            if field in body:
                _check(field, body[field])


def _check(field: str, value: Any) -> None:
    # With how often what holds a value is repeated. A list, for JSON may nest deeply.
    left: list[tuple[Any, float]] = [(value, 1)]
    while left:
        node, times = left.pop()
        if isinstance(node, dict):
            counts = [node[name] for name in _COUNTS if isinstance(node.get(name), int | float)]
            times *= max([1, *counts])
            _refuse(times, field)
            left += [(value, times) for value in node.values()]
        elif isinstance(node, list):
            left += [(value, times) for value in node]
        elif isinstance(node, str):
            for found in _IN_TEXT.finditer(node):
                for number in filter(None, found.groups()):
                    # Digits are counted first: int() takes long for many.
                    _refuse(times * (int(number) if len(number) < 10 else 1e10), field)


def _refuse(repetitions: float, field: str) -> None:
    if repetitions > MAX_REPETITIONS:
        raise GatewayError(
            400,
            f"{field} asks for more than {MAX_REPETITIONS} repetitions, nested ones multiplied",
            reason="grammar",
            param=field,
        )
