# SPDX-License-Identifier: Apache-2.0
"""The two servers of `bench.gateway`, a client of theirs, and who spends CPU time meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.load import Load
from bench.model import Model
from bench.server import Server
from himap_vllm.config import ADDITIONAL_CONFIG_KEY

VLLM, GATEWAY = SERVERS = ("vllm serve", "himap serve")
VLLM_BENCH, AIPERF, BLOCKS = "vllm bench serve", "AIPerf", "blocks"
MODEL = Model(num_layers=4, num_heads=1, hidden_size=64, intermediate_size=64)
DTYPE = "float32"
PRUNING = {"shallow_layer": 1, "deep_layer": 2, "shallow_ratio": 0.5, "deep_ratio": 0.75}
MAX_LENGTH = 1024
TEXT_TOKENS = 35
# After its last step an engine's worker spins for a second, on the core it shares with the other's.
SETTLE_SECONDS = 1.2
BLOCK_SIZE = 10  # requests
CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Traffic:
    """So many different streams, so many of them at once."""

    name: str
    images: int
    concurrency: int
    num_requests: int
    output_tokens: int

    def load(self, seed: int) -> Load:
        """For `vllm bench serve`."""
        return Load(
            concurrency=self.concurrency,
            num_requests=self.num_requests,
            text_tokens=TEXT_TOKENS,
            output_tokens=self.output_tokens,
            seed=seed,
            images=self.images,
        )


FULL = (
    Traffic("text, 1 stream", 0, 1, 40, 16),
    Traffic("image, 1 stream", 1, 1, 30, 16),
    Traffic("text, 32 streams", 0, 32, 160, 128),
    Traffic("image, 32 streams", 1, 32, 64, 64),
)
QUICK = (
    Traffic("text, 1 stream", 0, 1, 10, 8),
    Traffic("image, 1 stream", 1, 1, 5, 8),
    Traffic("text, 32 streams", 0, 32, 64, 64),
)


@dataclass(frozen=True)
class Metric:
    """A number by which the servers are compared."""

    key: str
    label: str
    digits: int


TTFT = Metric("ttft_ms", "median TTFT, ms", 2)
# Whatever else runs on the machine only ever adds: the fastest say more where it is busy.
FAST_TTFT = Metric("fast_ttft_ms", "10th percentile TTFT, ms", 2)
LATENCY = Metric("latency_ms", "median latency, ms", 2)
CHUNKS = Metric("chunks_per_second", "chunks/s", 0)
REQUEST_CPU = Metric("cpu_ms_per_request", "API server CPU, ms per request", 2)
CHUNK_CPU = Metric("cpu_us_per_chunk", "API server CPU, us per chunk", 1)
METRICS = (TTFT, FAST_TTFT, LATENCY, CHUNKS, REQUEST_CPU, CHUNK_CPU)


@dataclass(frozen=True)
class Measurement:
    """One load on one server.

    Attributes:
        generator: where the load came from.
        load: its name; measurements of one generator, load and round had the same requests.
        server: one of `SERVERS`.
        round_index: counted from 0.
        values: by a `Metric`'s key.
        cores: how many cores each party kept busy, by its name.
        raw: what the load generator says.
    """

    generator: str
    load: str
    server: str
    round_index: int
    values: dict[str, float]
    cores: dict[str, float]
    raw: dict[str, Any]


class Contestant(Server):
    """`vllm serve` or `himap serve`, and the CPU time of its processes."""

    def __init__(self, name: str, checkpoint: Path, flags: Sequence[str], work_dir: Path) -> None:
        log = work_dir / f"gateway-{name.partition(' ')[0]}.log"
        kv_bytes = 33 * MAX_LENGTH * MODEL.num_layers * MODEL.kv_bytes(DTYPE)
        common = [
            "--enforce-eager",
            "--dtype", DTYPE,
            "--max-model-len", str(MAX_LENGTH),
            "--max-num-seqs", "32",
            "--max-num-batched-tokens", "2048",
            "--block-size", "128",
            "--kv-cache-memory-bytes", str(kv_bytes),
            "--limit-mm-per-prompt", '{"image": 1}',
        ]  # fmt: skip
        config = ["--additional-config", json.dumps({ADDITIONAL_CONFIG_KEY: PRUNING})]
        if name == GATEWAY:
            config = [f"--{key.replace('_', '-')}={value}" for key, value in PRUNING.items()]
        # The counters of vLLM's server need their plugin by name.
        plugins = {"VLLM_PLUGINS": "himap" if name == GATEWAY else "himap,himap_stats"}
        super().__init__(name.split()[0], checkpoint, [*common, *config, *flags], log, plugins)

    def __enter__(self) -> Contestant:
        super().__enter__()
        for process in self.process.children(recursive=True):
            for thread in process.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
        return self

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time so far: of the API server process, and of the engine's processes."""
        children = self.process.children(recursive=True)
        return _cpu_seconds(self.process), sum(map(_cpu_seconds, children))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.guest - times.guest_nice - times.idle - times.iowait)


class Usage:
    """CPU time of everybody, from the construction to `stop`."""

    def __init__(self, servers: Mapping[str, Contestant], target: str) -> None:
        self._target = servers[target]
        self._others = [server for name, server in servers.items() if name != target]
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        api, engine = self._target.cpu_seconds()
        return {
            "API server": api,
            "engine": engine,
            "load generator": time.process_time(),
            "idle server": sum(sum(server.cpu_seconds()) for server in self._others),
            "machine": _machine_seconds(),
            "wall": time.monotonic(),
        }

    def stop(self) -> dict[str, float]:
        """Seconds spent by each."""
        spent = {party: now - self._before[party] for party, now in self._now().items()}
        wall, machine = spent.pop("wall"), spent.pop("machine")
        return {**spent, "others": machine - sum(spent.values()), "wall": wall}


class Client:
    """A kept-alive connection."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def send(self, path: str, body: bytes | None) -> tuple[float, bytes]:
        """POST `body`, or GET if there is none; ms until the first bytes came, and all of them.

        Raises:
            RuntimeError: another status than 200.
        """
        began = time.perf_counter()
        self._connection.request("GET" if body is None else "POST", path, body, self._headers)
        response = self._connection.getresponse()
        first = response.read1()
        elapsed = 1000 * (time.perf_counter() - began)
        answer = first + response.read()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {answer[:500]!r}")
        return elapsed, answer
