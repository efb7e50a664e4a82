# SPDX-License-Identifier: Apache-2.0
"""Two replicas that count the requests of API keys in one Redis, and what they do without it."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from himap_server.security.limits import StorageDownError
from himap_server.security.shared_limits import SharedCounts
from redis import Redis

from tests.gateway.support import client, gateway, metric, post
from tests.ops.conftest import program
from tests.servers import Server
from tests.world import World

PASSWORD = "a-password-that-no-log-may-have"
ERRORS = "himap_limits_storage_errors_total"
BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
_KEYS: dict[str, dict[str, int]] = {
    "rated": {"requests_per_minute": 4},
    "single": {"max_concurrent": 1},
    "lasting": {"requests_per_minute": 3},
    "free": {},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Store:
    """A Redis server that keeps nothing when it ends."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        flags = ("--port", str(self.port), "--save", "", "--requirepass", PASSWORD)
        self.process = subprocess.Popen(
            [program("redis-server"), *flags, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                Redis.from_url(self.url).ping()
                return
            except Exception:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    store.start()
    yield store
    store.kill()


@dataclass
class Replicas:
    """One goes on without the store, the other refuses; and their log."""

    lasting: Server
    strict: Server
    log: Path

    def ask(self, server: Server, key: str) -> tuple[int, Any]:
        status, headers, _ = post(server, "/v1/completions", BODY, authorization=f"Bearer {key}")
        return status, headers


@pytest.fixture(scope="module")
def replicas(
    world: World, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    keys = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}
        for name, limits in _KEYS.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    flags = ("--api-keys-file", str(folder / "keys.yaml"))
    with ExitStack() as running:
        servers = [
            running.enter_context(
                gateway(
                    world.checkpoint("mha12"),
                    *(*flags, "--limits-storage-failure", failure),
                    environment={"HIMAP_LIMITS_STORAGE": store.url, "VLLM_LOGGING_LEVEL": "DEBUG"},
                    log=folder / failure,
                )
            )
            for failure in ("local", "refuse")
        ]
        for server in servers:
            server.wait_for("/health/ready")
        yield Replicas(servers[0], servers[1], folder / "local")


def test_requests_per_minute_of_both(replicas: Replicas) -> None:
    both = (replicas.lasting, replicas.strict) * 2
    assert [replicas.ask(server, "rated")[0] for server in both] == [200] * 4
    for server in both[:2]:
        status, headers = replicas.ask(server, "rated")
        assert status == 429
        assert 1 <= int(headers["Retry-After"]) <= 60


def test_requests_at_the_same_time_of_both(replicas: Replicas) -> None:
    slow = client(replicas.lasting, "single").completions.create(
        model="tiny", prompt="hi", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(slow))
    assert replicas.ask(replicas.strict, "single")[0] == 429
    assert len(list(slow)) > 10
    # The client has read the end, and may send its next request at once.
    assert replicas.ask(replicas.strict, "single")[0] == 200
    assert replicas.ask(replicas.lasting, "single")[0] == 200


def test_without_the_store(replicas: Replicas, store: Store) -> None:
    """The replica that lasts counts for itself; the strict one refuses keys that have limits."""
    store.kill()
    lasting, strict = replicas.lasting, replicas.strict
    assert [replicas.ask(lasting, "lasting")[0] for _ in range(4)] == [200, 200, 200, 429]
    status, headers = replicas.ask(strict, "lasting")
    assert (status, int(headers["Retry-After"]) > 0) == (503, True)
    assert replicas.ask(strict, "free")[0] == 200
    assert metric(lasting, ERRORS) == 4
    assert metric(strict, ERRORS) == 1
    assert metric(strict, 'himap_refused_requests_total{model_name="tiny",reason="limits"}') == 1

    store.start()
    time.sleep(1.5)  # a replica asks the store every second
    answers = [replicas.ask(server, "lasting")[0] for server in (lasting, strict, lasting, strict)]
    assert answers == [200, 200, 200, 429]
    assert (metric(lasting, ERRORS), metric(strict, ERRORS)) == (4, 1)
    log = replicas.log.read_text()
    assert log.count("the store of limits is down, this replica counts for itself") == 1
    assert log.count("the store of limits answers again") == 1
    for file in replicas.log.parent.glob("*"):
        assert PASSWORD not in file.read_text()


def test_a_place_of_a_replica_that_died_is_free_in_the_end(store: Store) -> None:
    async def scenario() -> None:
        dead, alive = (SharedCounts(store.url, lease=0.5) for _ in range(2))
        assert await dead.enter("a", 1)
        assert await alive.enter("a", 1) is None
        assert await alive.enter("b", 1)
        await asyncio.sleep(0.6)
        place = await alive.enter("a", 1)
        assert place is not None
        await alive.leave("a", place)
        assert await dead.enter("a", 1)
        await dead.close()
        await alive.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("url", ["redis://:wrong@127.0.0.1:{port}", "redis://:wrong@127.0.0.1:1"])
def test_what_a_failure_says(store: Store, url: str) -> None:
    async def scenario() -> None:
        counts = SharedCounts(url.format(port=store.port), lease=1)
        with pytest.raises(StorageDownError, match=r"redis://127\.0\.0\.1:\d+: \w+Error") as error:
            await counts.enter("a", 1)
        assert "wrong" not in str(error.value)
        await counts.close()

    asyncio.run(scenario())
