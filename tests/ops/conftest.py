# SPDX-License-Identifier: Apache-2.0
"""A gateway under load, and the real Prometheus that scrapes it as deploy/ configures it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import programs
from tests.gateway.conftest import image_host
from tests.gateway.images import PICTURES, ImageHost
from tests.gateway.support import gateway, post
from tests.servers import Server, picture_message
from tests.world import World

__all__ = ["image_host"]  # the fixture, for this folder, too

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
_KEYS: dict[str, dict[str, int]] = {"load": {}, "limited": {"requests_per_minute": 1}}
_WAIT_SECONDS = 60.0
_IDLE_SECONDS = 10.0


def pytest_collection_finish(session: pytest.Session) -> None:
    """End the run before it begins where programs of chosen tests are missing."""
    chosen = any(item.path.is_relative_to(Path(__file__).parent) for item in session.items)
    if chosen and (complaint := programs.complaint({"ops"})) is not None:
        raise pytest.UsageError(complaint)


def program(name: str) -> str:
    """Path of a program."""
    path = programs.find(name)
    assert path is not None, f"{name} is missing"
    return path


def promtool(*arguments: str) -> str:
    """What promtool says; it must be content."""
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Prometheus:
    """A running Prometheus, and the one target that matters."""

    url: str
    target: str
    asked: float = field(default_factory=time.monotonic)

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API."""
        self.asked = time.monotonic()
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def values(self, query: str) -> list[float]:
        """Values of an instant query, NaN left out."""
        result = self.get("query", query=query)["result"]
        numbers = (float(series["value"][1]) for series in result)
        return [number for number in numbers if number == number]

    def names(self) -> set[str]:
        """All metrics that it has."""
        return set(self.get("label/__name__/values"))


def eventually(look: Callable[..., Any], *arguments: str) -> Any:
    """The first answer of `look` that is not empty; the last one if none came in time."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (found := look(*arguments)) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def _requests(image_host: ImageHost) -> list[tuple[str, dict[str, Any], str | None]]:
    """Path, body and key: one of each kind of request that a dashboard tells apart."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    pictured = [picture_message(PICTURES[0], "What is this, NUMBER?")]
    repeated = [picture_message(PICTURES[0], "Which shape is it?")]
    fetched = [picture_message(PICTURES[1], "And this, NUMBER?")]
    fetched[0]["content"][0]["image_url"]["url"] = image_host.url("1.png")
    private = [picture_message(PICTURES[1], "And this?")]
    private[0]["content"][0]["image_url"]["url"] = "http://127.0.0.1/0.png"
    common = {"model": "tiny", "max_tokens": 24, "ignore_eos": True}
    return [
        (chat, {**common, "messages": pictured}, "load"),
        (chat, {**common, "messages": pictured, "himap": {"enabled": False}}, "load"),
        (chat, {**common, "messages": pictured, "stream": True}, "load"),
        (chat, {**common, "messages": fetched}, "load"),
        (chat, {**common, "messages": repeated}, "load"),
        (text, {**common, "prompt": "one two three"}, "load"),
        # Refused: a ratio out of range, a private host, no key, too many for this key.
        (chat, {**common, "messages": pictured, "himap": {"deep_ratio": 2}}, "load"),
        (chat, {**common, "messages": private}, "load"),
        (text, {**common, "prompt": "one"}, None),
        (text, {**common, "prompt": "one"}, "limited"),
    ]


def _asked_anew(body: dict[str, Any], number: int) -> dict[str, Any]:
    """With a number in its question, so that the prefix cache does not have what is pruned."""
    messages = copy.deepcopy(body.get("messages", []))
    for message in messages:
        question = message["content"][-1]
        question["text"] = question["text"].replace("NUMBER", str(number))
    return body | {"messages": messages} if messages else body


@contextmanager
def _under_load(server: Server, image_host: ImageHost, prometheus: Prometheus) -> Iterator[None]:
    stop = threading.Event()
    failures: list[str] = []
    kinds = itertools.cycle(_requests(image_host))
    numbers = itertools.count()
    lock = threading.Lock()

    def drive() -> None:
        while not stop.is_set():
            if time.monotonic() - prometheus.asked > _IDLE_SECONDS:
                stop.wait(0.5)  # other tests of this folder need the processor
                continue
            with lock:
                path, body, key = next(kinds)
                number = next(numbers)
            body = _asked_anew(body, number)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            if body.get("stream"):
                status = _stream(server, path, body, headers)
            else:
                status, _, _ = post(server, path, body, **headers)
            if status >= 500:
                failures.append(f"{status} for {path} {body}")
            stop.wait(0.05)  # the machine has other things to do

    threads = [threading.Thread(target=drive) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures


def _stream(server: Server, path: str, body: dict[str, Any], headers: dict[str, str]) -> int:
    request = urllib.request.Request(
        f"{server.url}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.read().rstrip().endswith(b"data: [DONE]")
        return int(response.status)


def quick_configuration(target: str, own: str) -> dict[str, Any]:
    """The configuration of deploy/ with this target, every second, and no Alertmanager."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(
        ("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s"
    )
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    del config["alerting"]
    targets = {"himap": target, "prometheus": own}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    return config


@pytest.fixture(scope="package")
def prometheus(
    world: World,
    image_host: ImageHost,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Scrapes a gateway that is under load while tests ask."""
    folder = tmp_path_factory.mktemp("prometheus")
    keys = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}
        for name, limits in _KEYS.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    with gateway(
        world.checkpoint("mha12"),
        *("--api-keys-file", str(folder / "keys.yaml"), "--image-hosts", image_host.address),
    ) as server:
        server.wait_for("/health/ready")
        target = server.url.removeprefix("http://")
        with (
            _running_prometheus(folder, target) as running,
            _under_load(server, image_host, running),
        ):
            yield running


@contextmanager
def _running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(quick_configuration(target, address)))
    command = [
        program("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    process = subprocess.Popen(command, cwd=folder)
    try:
        Server(process, f"http://{address}").wait_for("/-/ready", 60)
        yield Prometheus(f"http://{address}", target)
    finally:
        process.terminate()
        process.wait(30)
