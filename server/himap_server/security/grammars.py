# SPDX-License-Identifier: Apache-2.0
"""Limits the repetitions of grammars, before a grammar compiler uses up the memory.

vLLM's grammar compilers write repetitions out. `"minItems": 1000000000`, in a request of a few
hundred bytes, took 12 GB (vLLM 0.32). The compiler that `auto` falls back to runs in this process,
and takes 1.2 kB for each of `maxItems`. Nested counts multiply, others add up. The next compiler,
which `patternProperties` leads to, writes an object out once for each of its optional properties.

* `vllm.v1.structured_output.StructuredOutputManager.grammar_init` (read): it compiles whatever a
  request has. Remove when: vLLM limits the repetitions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import GatewayError, Reason

MAX_REPETITIONS = 100_000
"""Limit for each field that may hold grammars."""

MAX_TEXT = 1 << 18
"""Most characters of one text that is searched: single calls of the search hold the GIL."""

# Fields of requests with schemas, regular expressions and grammars.
_FIELDS = ("response_format", "structured_outputs", "tools", "text")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# Keys of a schema whose text or data no compiler repeats.
_PROSE = frozenset({"title", "description", "default", "const", "enum", "examples"})
# In a string: a repetition of a regular expression or a grammar (`{2,5}`, Lark's `~ 2..5`), or a
# count in a text that only other parsers read as JSON. Possessive, so that a client can't make the
# search itself slow.
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
    # Values, with how often their parent is repeated and how often it is written out. A list and no
    # recursion, because JSON may nest deeply.
    left: list[tuple[Any, float, float]] = [(value, 1, 1)]
    while left:
        node, times, copies = left.pop()
        if isinstance(node, str):
            if len(node) > MAX_TEXT:
                text = f"{field} has a grammar, schema or text of more than {MAX_TEXT} characters"
                raise _refusal(field, text)
            written_out += (copies - 1) * len(node)
            schema = _as_json(node, field)
            if schema is not None:
                left.append((schema, times, copies))
            else:
                left += [(schema, times, copies) for schema in _lark_schemas(node, field)]
                for found in _IN_TEXT.finditer(node):
                    repeated += times * _times(found.groups())
                    if repeated > MAX_REPETITIONS:
                        break
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
    """Number of characters of a text, or of the texts in a list."""
    texts = [data] if isinstance(data, str) else data
    return sum(len(text) if isinstance(text, str) else 8 for text in texts)


def _times(numbers: tuple[str | None, ...]) -> float:
    # Count the digits first, because int() is slow for many.
    return max((int(n) if len(n) < 10 else 1e10) for n in numbers if n) if any(numbers) else 0


def _as_json(text: str, field: str) -> Any:
    """The schema in a text, as compilers read it; None if the text is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return _decode(text, field)
    except ValueError:
        return None  # a regular expression or a grammar


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
        if len(found) < len(pairs):  # compilers may disagree about which one counts
            raise _refusal(field, f"{field} has a schema that gives a key twice")
        return found

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    try:
        return decoder.decode(text) if begin is None else decoder.raw_decode(text, begin)[0]
    except RecursionError:
        raise _refusal(field, f"{field} has a schema that nests too deeply") from None


def _refusal(field: str, text: str) -> GatewayError:
    return GatewayError(400, text, reason=Reason.GRAMMAR, param=field)
