# SPDX-License-Identifier: Apache-2.0
"""When a client that found the queue full is to come back."""

from __future__ import annotations

import math
from collections import deque

_LONGEST_SECONDS = 30
# Before any answer is known: early retries cost little.
_FIRST_GUESS = 0.5
_NUM_ANSWERS = 32


class Retries:
    """Gives each refused client a time of its own, one for each place that becomes free.

    Places become free at the rate of the last answers. Times are in seconds, of any clock.
    """

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_NUM_ANSWERS)
        self._last_answer = 0.0
        self._next = 0.0

    def answered(self, started: float, now: float) -> None:
        """Note that a request that came at `started` has its answer."""
        # The time before the request came does not count: nobody waited for the engine then.
        self._gaps.append(max(0.0, now - max(self._last_answer, started)))
        self._last_answer = now

    def after(self, now: float) -> float:
        """Time until one more refused request is to come back; at most 30 s."""
        gap = sum(self._gaps) / len(self._gaps) if self._gaps else _FIRST_GUESS
        self._next = min(max(self._next, now) + gap, now + _LONGEST_SECONDS)
        return self._next - now


def headers(seconds: float) -> dict[str, str]:
    """`Retry-After`, in whole seconds, and `retry-after-ms`, which OpenAI's SDKs prefer."""
    whole = max(1, math.ceil(seconds))
    return {"retry-after": str(whole), "retry-after-ms": str(math.ceil(1000 * seconds))}
