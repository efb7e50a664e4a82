# SPDX-License-Identifier: Apache-2.0
"""Where a value stands in a body, and its name in errors.

Places are linked: a path for each value of a body would take the characters of all its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Step = str | int
Place = tuple[Any, Step]
"""The place of the parent, or None at the top, and the key or index in it."""

_MAX_CHARS = 200


def path_of(place: Place | None) -> str:
    """`text_of` a place."""
    steps: list[Step] = []
    while place is not None:
        place, step = place
        steps.append(step)
    return text_of(steps[::-1])


def text_of(path: Sequence[Step]) -> str:
    """`messages[0].content` of keys and indices, shortened."""
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_CHARS]}"
        for step in path[:_MAX_CHARS]
    ]
    return "".join(steps).removeprefix(".")[:_MAX_CHARS]
