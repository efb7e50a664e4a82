# SPDX-License-Identifier: Apache-2.0
"""`Retry-After` of a full queue: how long a crowd takes that does as it is told."""

from __future__ import annotations

import pytest
from himap_server.retries import Retries, headers


def crowd(places: int, clients: int, seconds: float, retries: Retries) -> tuple[float, int]:
    """Time until all have an answer, and the largest number of tries that one needed."""
    waiting = dict.fromkeys(range(clients), 0.0)
    tries = dict.fromkeys(range(clients), 0)
    running: dict[int, float] = {}
    now = 0.0
    while waiting or running:
        now = min([*waiting.values(), *(begun + seconds for begun in running.values())])
        for client, begun in list(running.items()):
            if begun + seconds <= now:
                retries.answered(begun, now)
                del running[client]
        for client, when in list(waiting.items()):
            if when <= now:
                tries[client] += 1
                if len(running) < places:
                    running[client] = now
                    del waiting[client]
                else:
                    waiting[client] = now + retries.after(now)
    return now, max(tries.values())


def test_sixteen_requests_on_two_places() -> None:
    took, tries = crowd(2, 16, 1.0, Retries())
    assert took < 9
    assert tries <= 3  # SDKs retry twice


@pytest.mark.parametrize(
    ("places", "clients", "seconds"), [(1, 10, 0.1), (4, 100, 2.0), (2, 6, 20.0), (8, 9, 5.0)]
)
def test_other_crowds_are_near_the_least_time(places: int, clients: int, seconds: float) -> None:
    retries = Retries()
    for index in range(places):
        retries.answered(0.0, seconds * (index + 1) / places)
    took, _ = crowd(places, clients, seconds, retries)
    assert took <= 2 * seconds * -(-clients // places)


def test_the_time_is_bounded() -> None:
    retries = Retries()
    retries.answered(0.0, 1000.0)
    assert [retries.after(2000.0) for _ in range(100)] == [30] * 100
    assert retries.after(3000.0) == 30
    idle = Retries()
    idle.answered(0.0, 1.0)
    idle.answered(500.0, 500.2)  # it was idle for 499 s
    assert idle.after(500.2) == pytest.approx(0.6)


def test_headers() -> None:
    assert headers(0.25) == {"retry-after": "1", "retry-after-ms": "250"}
    assert headers(2.0001) == {"retry-after": "3", "retry-after-ms": "2001"}
