# SPDX-License-Identifier: Apache-2.0
"""Where a value stands in a body: linked, so that walking over a body writes no path for each."""

from __future__ import annotations

from typing import Any

Place = tuple[Any, str | int]
"""The place of the parent, or None at the top, and the key or index in it."""

_MAX_CHARS = 200


def path_of(place: Place | None) -> str:
    """`messages[0].content` of a place, shortened."""
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_CHARS]}")
    return "".join(reversed(steps)).lstrip(".")[:_MAX_CHARS]
