# SPDX-License-Identifier: Apache-2.0
"""Limits of each API key: requests per minute, and requests at the same time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from ..errors import GatewayError, Reason
from .keys import Key


class KeyLimits:
    """Counts the requests of each key in this process. Each replica counts for itself."""

    def __init__(self) -> None:
        # This strategy needs two counters per key, whatever the limit.
        self._rates = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    @contextmanager
    def admit(self, key: Key) -> Iterator[None]:
        """Count a request of the key while the context is open.

        Raises:
            GatewayError: HTTP 429, with the time after which to retry.
        """
        limit = key.max_concurrent
        if limit is not None and self._running[key.name] >= limit:
            raise GatewayError(
                429,
                f"this API key may run {limit} request{'s' * (limit > 1)} at a time",
                reason=Reason.CONCURRENCY,
                retry_after=1,
            )
        if key.requests_per_minute is not None:
            item = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._rates.hit(item, key.name):
                reset = self._rates.get_window_stats(item, key.name).reset_time
                raise GatewayError(
                    429,
                    f"this API key may send {key.requests_per_minute} requests per minute",
                    reason=Reason.RATE,
                    retry_after=max(1, math.ceil(reset - time.time())),
                )
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1
