# SPDX-License-Identifier: Apache-2.0
"""The two servers of `bench.gateway`, the loads on them, and who spends CPU time meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import psutil
from himap_eval.local_server import engine_flags

from bench.load import Load
from bench.model import IMAGE_SIZE, Model
from bench.samples import Sample, turns
from bench.server import Server
from bench.tables import progress
from himap_vllm.config import ADDITIONAL_CONFIG_KEY
from tests.checkpoints import sample_images
from tests.servers import picture_message

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


class Traffic(NamedTuple):
    """So many different streams, so many of them at once."""

    name: str
    images: int
    concurrency: int
    num_requests: int
    output_tokens: int


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
# For one client: path and pictures, without a body where it is a GET.
LONE: dict[str, tuple[str, int | None]] = {
    "GET /v1/models": ("/v1/models", None),
    "text, 1 stream": (CHAT_PATH, 0),
    "image, 1 stream": (CHAT_PATH, 1),
}

# Label and digits, by key. Whatever else runs on the machine only ever adds to a time: the fastest
# say more where it is busy.
TTFT, FAST_TTFT, LATENCY = "ttft_ms", "fast_ttft_ms", "latency_ms"
CHUNKS, REQUEST_CPU, CHUNK_CPU = "chunks_per_second", "cpu_ms_per_request", "cpu_us_per_chunk"
METRICS = {
    TTFT: ("median TTFT, ms", 2),
    FAST_TTFT: ("10th percentile TTFT, ms", 2),
    LATENCY: ("median latency, ms", 2),
    CHUNKS: ("chunks/s", 0),
    REQUEST_CPU: ("API server CPU, ms per request", 2),
    CHUNK_CPU: ("API server CPU, us per chunk", 1),
}
# Cores that each party keeps busy; values of a sample, too.
PARTIES = ("API server", "engine", "load generator", "idle server", "others")


class Contestant(Server):
    """`vllm serve` or `himap serve`, and the CPU time of its processes."""

    def __init__(self, name: str, checkpoint: Path, flags: Sequence[str], work_dir: Path) -> None:
        kv_bytes = 33 * MAX_LENGTH * MODEL.num_layers * MODEL.kv_bytes(DTYPE)
        options = [
            "--enforce-eager",
            "--dtype", DTYPE,
            "--max-model-len", str(MAX_LENGTH),
            "--max-num-seqs", "32",
            "--max-num-batched-tokens", "2048",
            "--block-size", "128",
            "--kv-cache-memory-bytes", str(kv_bytes),
            "--limit-mm-per-prompt", '{"image": 1}',
        ]  # fmt: skip
        if name == GATEWAY:
            options += engine_flags(PRUNING)
        else:
            options += ["--additional-config", json.dumps({ADDITIONAL_CONFIG_KEY: PRUNING})]
        # The counters of vLLM's server need their plugin by name.
        plugins = {"VLLM_PLUGINS": "himap" if name == GATEWAY else "himap,himap_stats"}
        program = name.split()[0]
        log = work_dir / f"gateway-{program}.log"
        super().__init__(program, checkpoint, [*options, *flags], log, plugins)

    def __enter__(self) -> Contestant:
        super().__enter__()
        for process in self.process.children(recursive=True):
            for thread in process.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
        return self

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time so far: of the API server process, and of the engine's processes."""
        api, *engine = (
            sum(process.cpu_times()[:2])
            for process in (self.process, *self.process.children(recursive=True))
        )
        return api, sum(engine)


class Usage:
    """CPU time of everybody, from the construction to `stop`."""

    def __init__(self, servers: Mapping[str, Contestant], target: str) -> None:
        self._target = servers[target]
        self._others = [server for name, server in servers.items() if name != target]
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        api, engine = self._target.cpu_seconds()
        machine = psutil.cpu_times()
        idle = machine.guest + machine.guest_nice + machine.idle + machine.iowait
        return {
            "API server": api,
            "engine": engine,
            "load generator": time.process_time(),
            "idle server": sum(sum(server.cpu_seconds()) for server in self._others),
            "machine": sum(machine) - idle,
            "wall": time.monotonic(),
        }

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds that passed, and those spent by each party."""
        spent = {party: now - self._before[party] for party, now in self._now().items()}
        wall, machine = spent.pop("wall"), spent.pop("machine")
        return wall, {**spent, "others": machine - sum(spent.values())}


class Client:
    """A kept-alive connection."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"
        self.close = self._connection.close

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


# What a load generator found: median TTFT in ms, chunks, seconds, and what it says itself.
Found = tuple[float, int, float, dict[str, Any]]


class Bench:
    """Two running servers and the loads on them."""

    def __init__(
        self, servers: Mapping[str, Contestant], checkpoint: Path, work_dir: Path, aiperf: str
    ) -> None:
        self._servers, self._checkpoint = servers, checkpoint
        self._work_dir, self._aiperf_command = work_dir, aiperf
        self._log = work_dir / "gateway-load.log"
        self._log.unlink(missing_ok=True)
        self.repeated: list[str] = []

    def check_pruning(self) -> None:
        """Send a picture to both.

        Raises:
            RuntimeError: an engine did not prune.
        """
        for name, server in self._servers.items():
            with closing(Client(server)) as client:
                _, answer = client.send(CHAT_PATH, self._body(1, "check"))
            told = b'"himap":' in answer
            if not (told if name == GATEWAY else server.pruning_stats()["requests"]["pruned"]):
                raise RuntimeError(f"{name} did not prune; see {server.log}")

    def _body(self, images: int | None, name: str) -> bytes | None:
        """A streamed chat request that no other's prompt or picture is equal to; None for a GET."""
        if images is None:
            return None
        question = f"{name}: what is this?"
        message: Any = {"role": "user", "content": question}
        if images:
            picture = sample_images(1, zlib.crc32(name.encode()), size=IMAGE_SIZE)[0]
            message = picture_message(picture, question)
        request = {
            "model": self._checkpoint.name,
            "messages": [message],
            "max_completion_tokens": 4,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(request).encode()

    def _vllm_bench(self, traffic: Traffic, url: str, seed: int) -> Found:
        load = Load(
            traffic.concurrency, traffic.num_requests, TEXT_TOKENS, traffic.output_tokens, seed,
            traffic.images,
        )  # fmt: skip
        result = load.run(url, self._checkpoint, {}, self._log)
        chunks = sum(1 + len(latencies) for latencies in result.pop("itls"))
        return float(result["median_ttft_ms"]), chunks, result["duration"], result

    def _aiperf(self, traffic: Traffic, url: str, seed: int) -> Found:
        folder = self._work_dir / "aiperf"
        options = {
            "model": self._checkpoint.name,
            "url": url,
            "endpoint-type": "chat",
            "tokenizer": self._checkpoint,
            "concurrency": traffic.concurrency,
            "request-count": traffic.num_requests,
            "prompt-input-tokens-mean": TEXT_TOKENS,
            "prompt-input-tokens-stddev": 0,
            "prompt-output-tokens-mean": traffic.output_tokens,
            "extra-inputs": '{"ignore_eos": true, "temperature": 0}',
            "random-seed": seed,
            # One worker process: two cores have to do for all.
            "workers-max": 1,
            "record-processor-service-count": 1,
            "ui-type": "none",
            "output-artifact-dir": folder,
        }
        if traffic.images:
            options |= {"image-batch-size": 1, "image-format": "jpeg"}
            for side in ("width", "height"):
                options |= {f"image-{side}-mean": IMAGE_SIZE, f"image-{side}-stddev": 0}
        if key := os.environ.get("OPENAI_API_KEY"):
            options["api-key"] = key
        command = [self._aiperf_command, "profile", "--streaming"]
        command += ["--no-server-metrics", "--no-gpu-telemetry", *engine_flags(options)]
        # Told to be offline, it takes a tokenizer's folder for a name on the hub.
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        environ = {key: value for key, value in os.environ.items() if key not in offline}
        shutil.rmtree(folder, ignore_errors=True)
        with self._log.open("a") as output:
            ended = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False)
        if ended.returncode:
            raise RuntimeError(f"AIPerf ended with {ended.returncode}; see {self._log}")
        result = json.loads((folder / "profile_export_aiperf.json").read_text())
        lines = (folder / "profile_export.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        if len(records) != traffic.num_requests or any(r.get("error") for r in records):
            raise RuntimeError(f"requests failed; see {self._log}")
        chunks = sum(1 + len(r["metrics"]["inter_chunk_latency"]["value"]) for r in records)
        names = ("time_to_first_token", "output_token_throughput", "benchmark_duration")
        raw = {name: result[name] for name in names}
        return raw[names[0]]["p50"], chunks, raw[names[2]]["avg"], raw

    def _measure(self, generator: str, traffic: Traffic, server: str, index: int) -> Sample:
        generate: Callable[[Traffic, str, int], Found]
        generate = self._aiperf if generator == AIPERF else self._vllm_bench
        usage = Usage(self._servers, server)
        seed = 1000 * traffic.concurrency + index
        ttft, chunks, seconds, raw = generate(traffic, self._servers[server].url, seed)
        time.sleep(SETTLE_SECONDS)
        wall, cpu = usage.stop()
        values = {TTFT: ttft, REQUEST_CPU: 1e3 * cpu["API server"] / traffic.num_requests}
        if traffic.concurrency > 1:
            # One stream is as fast as the engine; its chunks are too few to divide by.
            values |= {CHUNKS: chunks / seconds, CHUNK_CPU: 1e6 * cpu["API server"] / chunks}
        values |= {party: spent / wall for party, spent in cpu.items()}
        if generator == AIPERF:  # its processes are among the others
            del values["load generator"]
        return Sample((traffic.name, generator), server, index, values, raw)

    def _repeat(self, generator: str, traffic: Traffic, server: str, index: int) -> Sample:
        """Once more, if a request fails: connections break where the machine stalls for seconds.

        Raises:
            RuntimeError: it fails again.
        """
        try:
            return self._measure(generator, traffic, server, index)
        except RuntimeError as error:
            progress(f"{traffic.name}, {server}: {error}; once more")
            self.repeated.append(f"{traffic.name}, {server}, round {index}: {error}")
            return self._measure(generator, traffic, server, index)

    def _blocks(self, number: int, index: int) -> list[Sample]:
        """Latency of a route without an engine behind it, and TTFT, in alternating blocks."""
        found = []
        for name, (path, images) in LONE.items():
            times: dict[str, list[float]] = {server: [] for server in SERVERS}
            for block in range(number):
                numbers = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                bodies = [self._body(images, f"{index}/{number}") for number in numbers]
                for server in turns(SERVERS, block + 1):
                    with closing(Client(self._servers[server])) as client:
                        client.send("/v1/models", None)  # connects
                        times[server] += [client.send(path, body)[0] for body in bodies]
                    if images is not None:
                        time.sleep(SETTLE_SECONDS)
            for server in SERVERS:
                middle, fast = median(times[server]), quantiles(times[server], n=10)[0]
                values = {LATENCY: middle} if images is None else {TTFT: middle, FAST_TTFT: fast}
                found.append(Sample((name, BLOCKS), server, index, values, times[server]))
        return found

    def warm_up(self, loads: Sequence[Traffic]) -> None:
        """Run each load unmeasured: code and memory are touched."""
        for traffic in loads:
            for server in SERVERS:
                self._repeat(VLLM_BENCH, traffic, server, -1)

    def round(
        self, loads: Sequence[Traffic], index: int, blocks: int, aiperf: bool
    ) -> list[Sample]:
        """All loads on both servers, which take turns at being first."""
        return [
            self._repeat(generator, traffic, server, index)
            for generator in ((VLLM_BENCH, AIPERF) if aiperf else (VLLM_BENCH,))
            for traffic in loads
            for server in turns(SERVERS, index + 1)
        ] + self._blocks(blocks, index)
