# SPDX-License-Identifier: Apache-2.0
"""Places of running requests are given back whatever happens."""

from __future__ import annotations

import asyncio
import time

import pytest
from himap_server.security.keys import Key
from himap_server.security.limits import KeyLimits, StorageDownError

KEY = Key(name="k", sha256="0" * 64, max_concurrent=2, requests_per_minute=10)


class Failing:
    """A store that fails between its two calls."""

    def __init__(self, error: BaseException) -> None:
        self.places: set[str] = set()
        self._error = error

    async def enter(self, key: str, limit: int) -> str | None:  # noqa: ARG002
        self.places.add("a place")
        return "a place"

    async def leave(self, key: str, place: str) -> None:  # noqa: ARG002
        self.places.discard(place)

    async def hit(self, key: str, per_minute: int) -> float | None:  # noqa: ARG002
        raise self._error


@pytest.mark.parametrize("error", [StorageDownError("down"), asyncio.CancelledError()])
def test_a_place_is_given_back_if_the_rate_is_not_counted(error: BaseException) -> None:
    store = Failing(error)

    async def scenario() -> None:
        async with KeyLimits(store).admit(KEY):
            pass

    if isinstance(error, StorageDownError):  # this process counts for itself
        asyncio.run(scenario())
    else:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(scenario())
    assert not store.places


class Hanging:
    """A store that fails late until it is mended."""

    def __init__(self) -> None:
        self.calls = 0
        self.is_mended = False

    async def enter(self, key: str, limit: int) -> str | None:  # noqa: ARG002
        self.calls += 1
        if not self.is_mended:
            await asyncio.sleep(0.1)
            raise StorageDownError("down")
        return "a place"

    async def leave(self, key: str, place: str) -> None:
        pass

    async def hit(self, key: str, per_minute: int) -> float | None:  # noqa: ARG002
        return None


def test_no_request_waits_for_a_store_that_is_known_to_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("himap_server.security.limits._RETRY_SECONDS", 0.05)
    key = KEY.model_copy(update={"max_concurrent": 100, "requests_per_minute": 10_000})
    store = Hanging()

    async def scenario() -> None:
        limits = KeyLimits(store)

        async def request() -> float:
            begun = time.monotonic()
            async with limits.admit(key):
                return time.monotonic() - begun

        await request()
        assert store.calls == 1
        # Through several probes, one at a time.
        waits = []
        for _ in range(60):
            waits += await asyncio.gather(*[request() for _ in range(5)])
            await asyncio.sleep(0.01)
        assert sorted(waits)[len(waits) // 2] < 0.02
        assert 2 <= store.calls <= 12
        assert max(waits) < 0.09
        store.is_mended = True
        await asyncio.sleep(0.4)
        calls = store.calls
        await request()
        assert store.calls == calls + 1

    asyncio.run(scenario())
