# SPDX-License-Identifier: Apache-2.0
"""Places of running requests are given back whatever happens."""

from __future__ import annotations

import asyncio
from collections import Counter

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


class Broken:
    """A store that does not answer, and fails only when it is told to.

    Attributes:
        calls: of `enter`, by key; probes have no key.
        counts_places, counts_rates: which of its calls answer.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.counts_places = self.counts_rates = False
        self.fail = asyncio.Event()

    async def _answer(self, is_mended: bool) -> None:
        if not is_mended:
            await self.fail.wait()
            raise StorageDownError("down")

    async def enter(self, key: str, limit: int) -> str | None:  # noqa: ARG002
        self.calls[key] += 1
        await self._answer(self.counts_places)
        return "a place"

    async def leave(self, key: str, place: str) -> None:
        pass

    async def hit(self, key: str, per_minute: int) -> float | None:  # noqa: ARG002
        await self._answer(self.counts_rates)
        return None


def test_no_request_waits_for_a_store_that_is_known_to_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("himap_server.security.limits._RETRY_SECONDS", 0.01)
    key = KEY.model_copy(update={"max_concurrent": 100, "requests_per_minute": 10_000})

    async def scenario() -> None:
        store = Broken()
        limits = KeyLimits(store)

        async def requests(number: int) -> None:
            for _ in range(number):
                async with limits.admit(key):
                    pass

        async def probes(number: int) -> None:
            while store.calls[""] < number:
                await asyncio.sleep(0.01)

        store.fail.set()
        await requests(1)
        store.fail.clear()
        for number in range(1, 4):
            await probes(number)  # it hangs
            await requests(50)
            assert store.calls == {key.name: 1, "": number}
            store.fail.set()
            await asyncio.sleep(0)
            store.fail.clear()
        # A server that can't write, for example.
        store.counts_places = True
        store.fail.set()
        await probes(store.calls[""] + 3)
        await requests(1)
        assert store.calls[key.name] == 1
        store.counts_rates = True
        while store.calls[key.name] == 1:
            await asyncio.sleep(0.01)
            await requests(1)

    asyncio.run(asyncio.wait_for(scenario(), 60))
