# SPDX-License-Identifier: Apache-2.0
"""The loads that `bench.gateway` puts on its two servers in turn."""

from __future__ import annotations

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
from typing import Any

from bench import load
from bench.contestants import (
    AIPERF,
    BLOCK_SIZE,
    BLOCKS,
    CHAT_PATH,
    CHUNK_CPU,
    CHUNKS,
    FAST_TTFT,
    GATEWAY,
    LATENCY,
    REQUEST_CPU,
    SERVERS,
    SETTLE_SECONDS,
    TEXT_TOKENS,
    TTFT,
    VLLM_BENCH,
    Client,
    Contestant,
    Measurement,
    Traffic,
    Usage,
)
from bench.model import IMAGE_SIZE
from bench.tables import progress
from tests.checkpoints import sample_images
from tests.servers import picture_message


class Bench:
    """Two running servers and the loads on them."""

    def __init__(
        self, servers: Mapping[str, Contestant], checkpoint: Path, work_dir: Path, aiperf: str
    ) -> None:
        self._servers = servers
        self._checkpoint = checkpoint
        self._work_dir = work_dir
        self._aiperf_command = aiperf
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

    def vllm_bench(self, traffic: Traffic, server: str, index: int) -> Measurement:
        """A load from `vllm bench serve`."""
        target = self._servers[server]
        arguments = traffic.load(1000 * traffic.concurrency + index).arguments(
            target.url, self._checkpoint, target.model_name, {}
        )
        usage = Usage(self._servers, server)
        result = load.run(arguments, self._log)
        chunks = sum(1 + len(latencies) for latencies in result.pop("itls"))
        return self._measurement(
            VLLM_BENCH, traffic, server, index, usage,
            ttft_ms=float(result["median_ttft_ms"]),  # of NumPy
            chunks=chunks,
            seconds=result["duration"],
            raw=result,
        )  # fmt: skip

    def aiperf(self, traffic: Traffic, server: str, index: int) -> Measurement:
        """A load from AIPerf."""
        target = self._servers[server]
        folder = self._work_dir / "aiperf"
        command = [
            self._aiperf_command, "profile",
            "--model", target.model_name,
            "--url", target.url,
            "--endpoint-type", "chat",
            "--streaming",
            "--tokenizer", str(self._checkpoint),
            "--concurrency", str(traffic.concurrency),
            "--request-count", str(traffic.num_requests),
            "--prompt-input-tokens-mean", str(TEXT_TOKENS),
            "--prompt-input-tokens-stddev", "0",
            "--prompt-output-tokens-mean", str(traffic.output_tokens),
            "--extra-inputs", '{"ignore_eos": true, "temperature": 0}',
            "--random-seed", str(1000 * traffic.concurrency + index),
            # One worker process: two cores have to do for all.
            "--workers-max", "1",
            "--record-processor-service-count", "1",
            "--no-server-metrics",
            "--no-gpu-telemetry",
            "--ui-type", "none",
            "--output-artifact-dir", str(folder),
        ]  # fmt: skip
        if traffic.images:
            command += ["--image-batch-size", "1", "--image-format", "jpeg"]
            for side in ("width", "height"):
                command += [f"--image-{side}-mean", str(IMAGE_SIZE), f"--image-{side}-stddev", "0"]
        if key := os.environ.get("OPENAI_API_KEY"):
            command += ["--api-key", key]
        # Told to be offline, it takes a tokenizer's folder for a name on the hub.
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        environ = {key: value for key, value in os.environ.items() if key not in offline}
        shutil.rmtree(folder, ignore_errors=True)
        usage = Usage(self._servers, server)
        with self._log.open("a") as output:
            ended = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False)
        if ended.returncode:
            raise RuntimeError(f"AIPerf ended with {ended.returncode}; see {self._log}")
        result = json.loads((folder / "profile_export_aiperf.json").read_text())
        lines = (folder / "profile_export.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        if len(records) != traffic.num_requests or any(r.get("error") for r in records):
            raise RuntimeError(f"requests failed; see {self._log}")
        names = ("time_to_first_token", "output_token_throughput", "benchmark_duration")
        return self._measurement(
            AIPERF, traffic, server, index, usage,
            ttft_ms=result["time_to_first_token"]["p50"],
            chunks=sum(1 + len(r["metrics"]["inter_chunk_latency"]["value"]) for r in records),
            seconds=result["benchmark_duration"]["avg"],
            raw={name: result[name] for name in names},
        )  # fmt: skip

    def _measurement(
        self,
        generator: str,
        traffic: Traffic,
        server: str,
        index: int,
        usage: Usage,
        *,
        ttft_ms: float,
        chunks: int,
        seconds: float,
        raw: dict[str, Any],
    ) -> Measurement:
        time.sleep(SETTLE_SECONDS)
        cpu = usage.stop()
        values = {
            TTFT.key: ttft_ms,
            CHUNKS.key: chunks / seconds,
            REQUEST_CPU.key: 1e3 * cpu["API server"] / traffic.num_requests,
            CHUNK_CPU.key: 1e6 * cpu["API server"] / chunks,
        }
        if traffic.concurrency == 1:
            # One stream is as fast as the engine; chunks are too few to divide by.
            del values[CHUNKS.key], values[CHUNK_CPU.key]
        wall = cpu.pop("wall")
        cores = {party: spent / wall for party, spent in cpu.items()}
        if generator == AIPERF:  # its processes are among the others
            del cores["load generator"]
        return Measurement(generator, traffic.name, server, index, values, cores, raw)

    def blocks(self, number: int, index: int) -> list[Measurement]:
        """Latency of a route without an engine behind it, and TTFT, in alternating blocks."""
        found = []
        loads: dict[str, tuple[str, int | None]] = {
            "GET /v1/models": ("/v1/models", None),
            "text, 1 stream": (CHAT_PATH, 0),
            "image, 1 stream": (CHAT_PATH, 1),
        }
        for name, (path, images) in loads.items():
            times: dict[str, list[float]] = {server: [] for server in SERVERS}
            for block in range(number):
                numbers = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                bodies = [self._body(images, f"{index}/{number}") for number in numbers]
                for server in SERVERS if block % 2 else SERVERS[::-1]:
                    with closing(Client(self._servers[server])) as client:
                        client.send("/v1/models", None)  # connects
                        times[server] += [client.send(path, body)[0] for body in bodies]
                    if images is not None:
                        time.sleep(SETTLE_SECONDS)
            for server in SERVERS:
                middle, fast = median(times[server]), quantiles(times[server], n=10)[0]
                values = {TTFT.key: middle, FAST_TTFT.key: fast}
                if images is None:
                    values = {LATENCY.key: middle}
                raw = {"ms": times[server]}
                found.append(Measurement(BLOCKS, name, server, index, values, {}, raw))
        return found

    def warm_up(self, loads: Sequence[Traffic]) -> None:
        """Run each load unmeasured: code and memory are touched."""
        for traffic in loads:
            for server in SERVERS:
                self._repeat(self.vllm_bench, traffic, server, -1)

    def round(
        self, loads: Sequence[Traffic], index: int, blocks: int, aiperf: bool
    ) -> list[Measurement]:
        """All loads on both servers, which take turns at being first."""
        order = SERVERS if index % 2 else SERVERS[::-1]
        return [
            self._repeat(generator, traffic, server, index)
            for generator in ([self.vllm_bench, self.aiperf] if aiperf else [self.vllm_bench])
            for traffic in loads
            for server in order
        ] + self.blocks(blocks, index)

    def _repeat(
        self,
        generator: Callable[[Traffic, str, int], Measurement],
        traffic: Traffic,
        server: str,
        index: int,
    ) -> Measurement:
        """Once more, if a request fails: connections break where the machine stalls for seconds.

        Raises:
            RuntimeError: it fails again.
        """
        try:
            return generator(traffic, server, index)
        except RuntimeError as error:
            progress(f"{traffic.name}, {server}: {error}; once more")
            self.repeated.append(f"{traffic.name}, {server}, round {index}: {error}")
            return generator(traffic, server, index)
