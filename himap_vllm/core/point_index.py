# SPDX-License-Identifier: Apache-2.0
"""Where sequences were left, so that a prompt need not be compared with all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_PREFIXES = 8192
"""Full blocks of which the points behind them are remembered."""

MAX_POINTS = 8
"""Points that are remembered behind one full block."""


class PointIndex:
    """Where sequences were left, by the hash of the last full block of the first stage.

    An entry may be out of date: the blocks decide.
    """

    def __init__(self) -> None:
        self._points: OrderedDict[bytes, list[int]] = OrderedDict()

    def add(self, prefix: bytes, num_tokens: int) -> None:
        """Remember a point behind a prefix."""
        points = self._points.setdefault(prefix, [])
        self._points.move_to_end(prefix)
        if num_tokens in points:
            points.remove(num_tokens)
        points.append(num_tokens)
        del points[:-MAX_POINTS]
        while len(self._points) > MAX_PREFIXES:
            self._points.popitem(last=False)

    def behind(self, prefix: bytes) -> Sequence[int]:
        """Points behind a prefix, none of which may still be cached."""
        return self._points.get(prefix, ())

    def clear(self) -> None:
        """Forget all."""
        self._points.clear()
