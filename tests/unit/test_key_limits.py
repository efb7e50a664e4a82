# SPDX-License-Identifier: Apache-2.0
"""Places of running requests are given back whatever happens."""

from __future__ import annotations

import asyncio

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
