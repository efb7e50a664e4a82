# SPDX-License-Identifier: Apache-2.0
"""Starting, draining and dying: each with a server of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.gateway.hostile import CHAT, GOOD
from tests.gateway.support import client, gateway, metric, post
from tests.gateway.test_api import MESSAGES
from tests.servers import Server
from tests.world import World

REQUEST_LOG = '"vllm.himap.request"'


# One process for all, as each would import vLLM.
_REFUSALS = """
import contextlib, io, json, sys
from himap_server.cli import main

refused = []
for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = main(command)
        except SystemExit as ended:
            status = ended.code
    refused.append([status, said.getvalue()])
print("\\n" + json.dumps(refused))
"""


def test_flags_that_would_be_ignored_are_refused(world: World) -> None:
    flags = {"--api-key": "secret", "--ssl-certfile": "x", "--ssl-ciphers": "x"}
    model = str(world.checkpoint("mha12"))
    commands = [["serve", model, flag, value] for flag, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-c", _REFUSALS, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused = json.loads(done.stdout.splitlines()[-1])
    assert [status for status, _ in refused] == [2] * len(flags)
    for flag, (_, said) in zip(flags, refused, strict=True):
        assert f"{flag} is not supported by himap serve" in said


def test_sigterm_while_loading(world: World) -> None:
    with gateway(world.checkpoint("mha12")) as server:
        server.wait_for("/health/live", 60)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert not psutil.wait_procs(children, timeout=20)[1]


def ask(server: Server, stream: bool) -> int:
    """A request of 300 tokens; how many came."""
    answer: Any = client(server).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=300,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
        extra_body={"ignore_eos": True},
    )
    usage = [chunk.usage for chunk in answer][-1] if stream else answer.usage
    return int(usage.completion_tokens)


def test_sigterm_under_load(world: World) -> None:
    """No new requests; those in flight finish; probes tell the difference.

    The queue is full before: a client is told when to come back.
    """
    with (
        gateway(world.checkpoint("mha12"), "--max-num-queued-reqs", "6") as server,
        ThreadPoolExecutor(8) as pool,
    ):
        server.wait_for("/health/ready")
        answers = [pool.submit(ask, server, number % 2 == 0) for number in range(6)]
        wait_until_running(server, 6)
        wait_until_running(server, 6, "vllm:num_requests_running")
        for _ in range(3):
            status, headers, body = post(server, CHAT, GOOD[CHAT])
            assert (status, body["error"]["type"]) == (503, "server_error")
            assert 1 <= int(headers["Retry-After"]) <= 30
            assert 0 < int(headers["retry-after-ms"]) <= 30_000
        assert metric(
            server, 'himap_refused_requests_total{model_name="tiny",reason="engine_busy"}'
        )
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.status("/health/live") == 200
        assert server.status("/health/ready") == 503
        status, headers, body = post(server, "/v1/chat/completions", {})
        assert (status, body["error"]["message"]) == (503, "the server is shutting down")
        assert headers["Retry-After"]
        assert [answer.result(60) for answer in answers] == [300] * 6
        assert server.process.wait(60) == 0


def test_death_of_the_engine_ends_the_service(world: World, tmp_path: Path) -> None:
    """Requests in flight end with an error, and the process with a status for its supervisor."""
    log = tmp_path / "log"
    with (
        gateway(
            world.checkpoint("mha12"), environment={"VLLM_LOGGING_LEVEL": "INFO"}, log=log
        ) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        server.wait_for("/health/ready")
        answers = [pool.submit(ask, server, number % 2 == 0) for number in range(4)]
        wait_until_running(server, 4)
        (core,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "EngineCore" in " ".join(child.cmdline())
        )
        core.kill()
        for answer in answers:
            with pytest.raises(openai.APIError) as error:
                answer.result(60)
            # In OpenAI's shape, and not just a connection that breaks.
            assert isinstance(error.value.body, dict), error.value
        assert server.process.wait(60) == 1
    lines = [json.loads(line) for line in log.read_text().splitlines() if REQUEST_LOG in line]
    found = sorted((line["stream"], line["status"], line["reason"]) for line in lines)
    # A stream had begun with 200, and is a failure all the same.
    assert found == [(False, 503, "failed")] * 2 + [(True, 500, "error")] * 2


def wait_until_running(server: Server, count: int, name: str = "himap_requests_in_flight") -> None:
    """Requests are on their way through the engine."""
    deadline = time.monotonic() + 60
    while metric(server, name) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
