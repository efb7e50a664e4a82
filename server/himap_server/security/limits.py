# SPDX-License-Identifier: Apache-2.0
"""Limits of each API key: requests per minute, and requests at the same time.

They are counted in this process, or in a store that replicas share (shared_limits.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal, Protocol

import prometheus_client
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from ..errors import GatewayError, Reason
from .keys import Key

logger = logging.getLogger("vllm.himap.server")

OnFailure = Literal["local", "refuse"]

_RETRY_SECONDS = 1.0
"""While the store is down it is asked again after so long. No request waits for it meanwhile."""

_PROBE = ""  # no key has this name

_ERRORS = prometheus_client.Counter(
    "himap_limits_storage_errors", "requests for which the shared store of limits did not answer"
)


class StorageDownError(Exception):
    """The store of the limits does not answer. The message has no password."""


class Counts(Protocol):
    """Counts of requests, by the names of keys."""

    async def enter(self, key: str, limit: int) -> str | None:
        """Take one of `limit` places; returns what gives it back, or None if none is free."""

    async def leave(self, key: str, place: str) -> None:
        """Give a place back."""

    async def hit(self, key: str, per_minute: int) -> float | None:
        """Count a request; None, or the time after which one more fits in, in seconds."""


class LocalCounts:
    """Counts of this process."""

    def __init__(self) -> None:
        # This strategy needs two counters per key, whatever the limit.
        self._rates = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    async def enter(self, key: str, limit: int) -> str | None:
        """See Counts."""
        if self._running[key] >= limit:
            return None
        self._running[key] += 1
        return key

    async def leave(self, key: str, place: str) -> None:  # noqa: ARG002
        """See Counts."""
        self._running[key] -= 1

    async def hit(self, key: str, per_minute: int) -> float | None:
        """See Counts."""
        item = RateLimitItemPerMinute(per_minute)
        if self._rates.hit(item, key):
            return None
        return self._rates.get_window_stats(item, key).reset_time - time.time()


class KeyLimits:
    """Admits requests of keys within their limits.

    Args:
        shared: counts of all replicas; None: this process counts for itself.
        on_failure: `local`: this process counts for itself as long as `shared` is down; `refuse`:
            requests of keys with limits get 503.
    """

    def __init__(self, shared: Counts | None = None, on_failure: OnFailure = "local") -> None:
        self._local = LocalCounts()
        self._shared = shared
        self._on_failure = on_failure
        self._recovery: asyncio.Task[None] | None = None  # as long as `shared` is down

    @asynccontextmanager
    async def admit(self, key: Key) -> AsyncIterator[None]:
        """Count a request of the key while the context is open.

        Raises:
            GatewayError: HTTP 429, with the time after which to retry; 503 if the store is down.
        """
        if key.max_concurrent is None and key.requests_per_minute is None:
            yield
            return
        place = None
        counts = self._counts()
        try:
            place = await _admit(counts, key)
        except StorageDownError as error:
            self._went_down(error)
            counts = self._fallback()
            place = await _admit(counts, key)
        try:
            yield
        finally:
            if place is not None:
                await self._leave(counts, key, place)

    def _counts(self) -> Counts:
        if self._shared is None:
            return self._local
        return self._shared if self._recovery is None else self._fallback()

    def _went_down(self, error: StorageDownError) -> None:
        if self._recovery is not None:  # a request that was waiting, too
            return
        then = {"local": "this replica counts for itself", "refuse": "requests are refused"}
        logger.error("the store of limits is down, %s: %s", then[self._on_failure], error)
        self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Ask the store for a place and a rate, as requests do, until it answers."""
        assert self._shared is not None
        try:
            while True:
                await asyncio.sleep(_RETRY_SECONDS)
                with suppress(StorageDownError):
                    place = await self._shared.enter(_PROBE, 1)
                    if place is not None:
                        await self._shared.leave(_PROBE, place)
                    await self._shared.hit(_PROBE, 60)
                    break
        finally:
            self._recovery = None
        logger.warning("the store of limits answers again: limits hold over all replicas")

    def _fallback(self) -> Counts:
        _ERRORS.inc()
        if self._on_failure == "refuse":
            raise GatewayError(
                503,
                "the limits of API keys can't be checked now",
                reason=Reason.LIMITS,
                retry_after=math.ceil(_RETRY_SECONDS),
            )
        return self._local

    async def _leave(self, counts: Counts, key: Key, place: str) -> None:
        try:
            await counts.leave(key.name, place)
        except StorageDownError as error:  # the place is free when its lease ends
            _ERRORS.inc()
            logger.debug("a place was not given back: %s", error)


async def _admit(counts: Counts, key: Key) -> str | None:
    """The place of a request that is within its key's limits; None if it needs none."""
    limit, rate = key.max_concurrent, key.requests_per_minute
    place = None
    if limit is not None:
        place = await counts.enter(key.name, limit)
        if place is None:
            raise GatewayError(
                429,
                f"this API key may run {limit} request{'s' * (limit > 1)} at a time",
                reason=Reason.CONCURRENCY,
                retry_after=1,
            )
    try:
        wait = None if rate is None else await counts.hit(key.name, rate)
        if wait is not None:
            raise GatewayError(
                429,
                f"this API key may send {rate} requests per minute",
                reason=Reason.RATE,
                retry_after=max(1, math.ceil(wait)),
            )
    except BaseException:
        if place is not None:
            with suppress(StorageDownError):  # the place is free when its lease ends
                await counts.leave(key.name, place)
        raise
    return place
