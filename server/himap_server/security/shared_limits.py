# SPDX-License-Identifier: Apache-2.0
"""Counts of requests in a Redis or Valkey server, which all replicas of the gateway share.

A place of a running request is a lease: if a replica ends without giving it back, it is free again
when a request of its age would have timed out.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from .limits import StorageDownError
from .store_urls import SCHEMES, address_of

logger = logging.getLogger("vllm.himap.server")

_PREFIX = "himap"
_CALL_SECONDS = 1.0
"""For one answer of the server, a new connection included."""

# Of the server's clock, because those of replicas differ.
_ENTER = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZSCORE', KEYS[1], ARGV[3]) then
    return 1  -- a second try, as the first one's answer was lost
end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
    return 0
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[1], math.ceil(1000 * ARGV[2]))
return 1
"""


class SharedCounts:
    """Counts in the server at `url`; each place is leased for `lease` seconds."""

    def __init__(self, url: str, lease: float) -> None:
        self._address = address_of(url)
        self._lease = lease
        scheme, _, rest = url.partition("://")
        pool = ConnectionPool.from_url(
            f"{SCHEMES[scheme]}://{rest}",
            socket_timeout=_CALL_SECONDS,
            socket_connect_timeout=_CALL_SECONDS,
            retry=Retry(NoBackoff(), 1),  # the server closes idle connections, and may restart
        )
        self._redis = Redis(connection_pool=pool)
        options: Any = {"connection_pool": pool}  # documented, but not in its types
        storage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=_PREFIX, **options
        )
        self._rates = SlidingWindowCounterRateLimiter(storage)
        self._enter = self._redis.register_script(_ENTER)
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, key: str, limit: int) -> str | None:
        """See Counts."""
        place = uuid.uuid4().hex
        try:
            async with self._calling():
                taken = await self._enter(keys=[_running(key)], args=[limit, self._lease, place])
        except BaseException:  # the server may have taken it before its answer was lost
            self._leaving(key, place)
            raise
        return place if taken else None

    async def leave(self, key: str, place: str) -> None:
        """See Counts. It goes on if the request is cancelled meanwhile."""
        await asyncio.shield(self._leaving(key, place))

    def _leaving(self, key: str, place: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._leave(key, place))
        self._tasks.add(task)  # the event loop itself keeps no reference
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # is seen: whoever waits raises it, and the lease ends by itself

    async def _leave(self, key: str, place: str) -> None:
        async with self._calling():
            await self._redis.zrem(_running(key), place)

    async def hit(self, key: str, per_minute: int) -> float | None:
        """See Counts."""
        item = RateLimitItemPerMinute(per_minute)
        async with self._calling():
            if await self._rates.hit(item, key):
                return None
            return (await self._rates.get_window_stats(item, key)).reset_time - time.time()

    async def check(self) -> None:
        """Log whether the server answers."""
        try:
            async with self._calling():
                await self._redis.ping()
            logger.info("the limits of API keys are counted in %s", self._address)
        except StorageDownError as error:
            logger.error("the store of limits does not answer: %s", error)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose(close_connection_pool=True)

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(2 * _CALL_SECONDS):
                yield
        except (RedisError, OSError, TimeoutError) as error:  # their texts may quote the URL
            raise StorageDownError(f"{self._address}: {type(error).__name__}") from None


def _running(key: str) -> str:
    return f"{_PREFIX}:running:{key}"
