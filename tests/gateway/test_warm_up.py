# SPDX-License-Identifier: Apache-2.0
"""The requests that a server answers to itself before it is ready, and the first of clients."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engines import GROUPING, IMAGE_TOKENS
from tests.gateway.support import gateway, metric, post
from tests.gateway.test_api import MESSAGES
from tests.servers import Server
from tests.world import World

_LOGS = {"VLLM_LOGGING_LEVEL": "INFO"}
_KINDS = 'himap_prompt_tokens_total{kind="'

_DIES_AT_WORK = """
import os

def register():
    from himap_vllm.runner.cpu_worker import PruningCPUWorker

    PruningCPUWorker.execute_model = lambda self, scheduled: os.abort()
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "log"


@pytest.fixture(scope="module")
def fresh(world: World, log: Path) -> Iterator[Server]:
    """A server that nobody has asked anything before the first test."""
    details = "--enable-prompt-tokens-details"
    with gateway(world.checkpoint("mha12"), details, environment=_LOGS, log=log) as server:
        server.wait_for("/health/ready")
        yield server


def test_nothing_counts_the_warm_up(fresh: Server, log: Path) -> None:
    """A picture was pruned, and all counters of vLLM, of the gateway and of the plugin say 0."""
    with urllib.request.urlopen(f"{fresh.url}/metrics") as response:
        text = response.read().decode()
    lines = log.read_text()
    assert "warmed up with text" in lines
    assert "warmed up with picture" in lines
    assert "warm-up-" not in lines  # no log of requests
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith(("vllm:", "himap_")) and family.type in ("counter", "histogram")
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    }
    assert "himap_kv_blocks_total" in text
    assert counted == {}


def logged(log: Path, request_id: str) -> dict[str, Any]:
    """The log line of a request; it is written when the answer is out."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if '"vllm.himap.request"' in line and f'"{request_id}"' in line:
                found: dict[str, Any] = json.loads(line)
                return found
        time.sleep(0.1)
    raise AssertionError(f"no log line of {request_id}")


def test_tokens_apart_and_those_from_the_prefix_cache(fresh: Server, log: Path) -> None:
    """Answer, log and metrics say of repeated requests what the engine counted."""
    largest = max(GROUPING.block_sizes)
    text = {"type": "text", "text": "Words before the picture. " * 2}
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": [text, *MESSAGES[0]["content"]]}]
    for pruned, turn in ((False, 0), (False, 1), (True, 0), (True, 1)):
        hits = metric(fresh, "vllm:prefix_cache_hits_total")
        counted = [metric(fresh, f"{_KINDS}{kind}") for kind in ("image", "text")]
        name = f"tokens-{pruned}-{turn}"
        status, _, answer = post(
            fresh,
            "/v1/chat/completions",
            {**body, "himap": {"enabled": pruned}},
            **{"X-Request-Id": name},
        )
        assert (status, answer.get("error")) == (200, None)
        line, prompt = logged(log, name), answer["usage"]["prompt_tokens"]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        # The last token is always computed. Unpruned prompts are found in blocks, of which the
        # first stage's are the largest; pruned ones to where they ended.
        found = prompt - 1 if pruned else (prompt - 1) // largest * largest
        assert cached == turn * found
        assert found
        deadline = time.monotonic() + 10  # vLLM counts when the answer is out
        while metric(fresh, "vllm:prefix_cache_hits_total") != hits + cached:
            assert time.monotonic() < deadline
        tokens = [IMAGE_TOKENS, prompt - IMAGE_TOKENS]
        assert [line["prompt_image_tokens"], line["prompt_text_tokens"]] == tokens
        assert (line["prompt_tokens"], line["cached_tokens"]) == (prompt, cached)
        assert [metric(fresh, f"{_KINDS}{kind}") for kind in ("image", "text")] == [
            before + more for before, more in zip(counted, tokens, strict=True)
        ]


def test_an_engine_that_dies_of_its_first_request_never_was_ready(
    world: World, tmp_path: Path
) -> None:
    """Its worker aborts as soon as there is work, by a vLLM plugin of the test's own."""
    (tmp_path / "dies_at_work.py").write_text(_DIES_AT_WORK)
    metadata = tmp_path / "dies_at_work-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dies-at-work\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndies_at_work = dies_at_work:register\n"
    )
    log = tmp_path / "log"
    environment = {**_LOGS, "PYTHONPATH": str(tmp_path)}
    with gateway(world.checkpoint("mha12"), environment=environment, log=log) as server:
        server.wait_for("/health/live", 120)
        while server.process.poll() is None:
            assert server.status("/health/ready") != 200
            time.sleep(0.2)
        assert server.process.returncode == 1
    assert "the engine failed the warm-up request (text)" in log.read_text()
