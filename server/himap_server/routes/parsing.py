# SPDX-License-Identifier: Apache-2.0
"""JSON of bodies, within what the engine can take: it would fail on anything else, as our error."""

from __future__ import annotations

import json
import re
import sys
from math import copysign, isinf
from typing import Any

import numpy as np
from pydantic_core import from_json

from ..errors import GatewayError, Reason

INTEGERS = range(-(2**63), 2**63)
"""What the engine's messages have for an integer, but in a schema."""

# Validation takes 1 us for each, in single calls that hold the interpreter lock.
_MAX_VALUES = 300_000
_MAX_DIGITS = 300  # a double has no more
_LARGEST = sys.float_info.max
_LARGEST_INTEGER = 10**_MAX_DIGITS
# Fields whose integers are a schema's, which may have larger ones.
_SCHEMAS = frozenset({"structured_outputs", "response_format", "tools", "text"})
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_A_PAIR = "the body has half of a surrogate pair, which is no character"


def parse(raw: bytes) -> Any:
    """The value of a body; None if it is empty.

    Numbers are as large as their types: an integer beyond 64 bits becomes a double, and what is
    beyond a double the largest one. So the field's own check refuses it, and names the range.
    Integers of 64 bits without a sign stay integers in a schema; all do at the top of the body,
    where `body.py` checks them.

    Raises:
        GatewayError: HTTP 400 or 413.
    """
    # Megabytes of small values, unlike text and images, block the event loop for seconds.
    if len(raw) > _MAX_VALUES and _num_values(raw) > _MAX_VALUES:
        text = f"the body has more than {_MAX_VALUES} values"
        raise GatewayError(413, text, reason=Reason.BODY_VALUES)
    if not raw:
        return None
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError:
        body = _read_slowly(raw)
    if isinstance(body, dict | list):
        _settle_large(body)
    return body


def _read_slowly(raw: bytes) -> Any:
    """What `from_json` does not read: other encodings, deep nesting, long numbers, and errors.

    For a photo it takes a tenth of the time of `json`, and both hold the interpreter lock for all
    of it. But it does not say as well what is wrong.
    """
    try:
        text = _decode(raw)
        body = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(body, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        text = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise GatewayError(400, text, reason=Reason.INVALID) from None
    except UnicodeEncodeError:
        raise GatewayError(400, _HALF_A_PAIR, reason=Reason.INVALID) from None
    except RecursionError:
        raise GatewayError(400, "the body nests too deeply", reason=Reason.INVALID) from None
    return body


def _decode(raw: bytes) -> str:
    """The text of a body. `json.loads` would take bytes of half a surrogate pair."""
    encoding = json.detect_encoding(raw)
    message = _HALF_A_PAIR
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        try:
            raw.decode(encoding, "surrogatepass")
        except UnicodeDecodeError:
            message = "the body is not UTF-8"
    raise GatewayError(400, message, reason=Reason.INVALID)


def _num_values(raw: bytes) -> int:
    # bytes.count takes ten times as long if there are many.
    return int(np.count_nonzero(np.frombuffer(raw, np.uint8) == ord(",")))


def _refuse_constant(name: str) -> Any:
    raise GatewayError(400, f"{name} is not JSON", reason=Reason.INVALID)


def _integer(digits: str) -> int:
    return int(digits[:_MAX_DIGITS])  # Python refuses thousands, which are as much too large


def _settle_large(body: Any) -> None:
    """Make numbers that the engine takes of large ones, in place; see `parse`."""
    rest: list[tuple[Any, bool, bool]] = [(body, True, False)]
    while rest:
        node, is_top, in_schema = rest.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            kind = type(value)
            if kind is dict or kind is list:
                rest.append((value, False, in_schema or (is_top and key in _SCHEMAS)))
            elif kind is int and value not in INTEGERS:
                is_schemas = in_schema or (is_top and key in _SCHEMAS)
                if is_top and not is_schemas:
                    node[key] = max(-_LARGEST_INTEGER, min(value, _LARGEST_INTEGER))
                elif not (is_schemas and 0 < value < 2**64):
                    node[key] = _double(value)
            elif kind is float and isinf(value):
                node[key] = copysign(_LARGEST, value)


def _double(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return _LARGEST if value > 0 else -_LARGEST
