# SPDX-License-Identifier: Apache-2.0
"""The requests that a server answers to itself before it is ready."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.support import gateway
from tests.world import World

_LOGS = {"VLLM_LOGGING_LEVEL": "INFO"}

_DIES_AT_WORK = """
import os

def register():
    from himap_vllm.runner.cpu_worker import PruningCPUWorker

    PruningCPUWorker.execute_model = lambda self, scheduled: os.abort()
"""


def test_nothing_counts_the_warm_up(world: World, tmp_path: Path) -> None:
    """A picture was pruned, and all counters of vLLM, of the gateway and of the plugin say 0."""
    log = tmp_path / "log"
    with gateway(world.checkpoint("mha12"), environment=_LOGS, log=log) as server:
        server.wait_for("/health/ready")
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
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
