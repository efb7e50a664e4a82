# SPDX-License-Identifier: Apache-2.0
"""Good, hostile and broken-off requests by the thousand: `python -m bench.soak --requests 10000`.

The soak starts `himap serve` on a tiny checkpoint and sends it a seeded mix of requests at a fixed
concurrency, all on loopback; hostile ones come from `tests.gateway.hostile`. Afterwards the service
must be as before: ready, idle, with an empty KV cache, with the same answer to a good request, and
no larger than after the warm-up. It prints Markdown. The exit status is 1 if a check failed. The
server's log stays in `--work-dir`.

Bounded caches (processed images, kernels) are set so small that they are full before the warm-up
ends: what grows after that is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from statistics import median
from urllib.parse import urlsplit

import aiohttp
import psutil

from bench.server import HIMAP, Server
from bench.tables import Check, progress, table
from bench.traffic import ALLOWED, MAX_BODY_BYTES, Traffic, image_host
from tests.checkpoints import build_llava
from tests.gateway.hostile import TEXT

WARM_UP = 0.2  # share of the requests
WINDOW = 0.1  # share of the requests whose samples of memory are taken together
GROWTH_ALLOWED = 0.05
SAMPLE_SECONDS = 0.25
IDLE_SECONDS = 30.0


class Gateway(Server):
    """`himap serve` on a tiny model."""

    def __init__(self, checkpoint: Path, flags: list[str], log: Path) -> None:
        """Prepare; `__enter__` starts it."""
        arguments = [
            "--enforce-eager",
            "--dtype", "float32",
            "--max-model-len", "512",
            "--max-num-seqs", "8",
            "--block-size", "32",
            "--kv-cache-memory-bytes", str(64 << 20),
            "--mm-processor-cache-gb", "0.02",
            "--shallow-layer", "2",
            "--deep-layer", "8",
            "--max-deep-ratio", "0.9",
            "--max-body-bytes", str(MAX_BODY_BYTES),
            "--image-timeout", "6",
            "--enable-auto-tool-choice",
            "--tool-call-parser", "hermes",
            *flags,
        ]  # fmt: skip
        # On a CPU the kernels for every new shape of a batch are kept, by default 1024 of them:
        # the worker would grow by some 200 MiB until that is full, after thousands of requests.
        environment = {"VLLM_PLUGINS": "himap", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
        super().__init__(HIMAP, checkpoint, arguments, log, environment)

    def memory(self) -> dict[str, int]:
        """Resident bytes by process: the API server, and the engine's by their names."""
        sizes: Counter[str] = Counter()
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                engine = next((name for name in ("EngineCore", "Worker") if name in words), "")
                name = "API server" if process.pid == self.process.pid else engine
                if name:  # Python's resource tracker is not of interest
                    sizes[name] += process.memory_info().rss
        return dict(sizes)


async def soak(
    arguments: argparse.Namespace, checkpoint: Path, work_dir: Path
) -> tuple[Traffic, list[Check]]:
    """Start the server, send everything, look at what is left."""
    key = secrets.token_hex(32)
    keys = work_dir / "soak-keys.yaml"
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(json.dumps({"keys": [{"name": "soak", "sha256": digest}]}))
    async with image_host() as images:
        flags = ["--image-hosts", urlsplit(images).netloc, "--api-keys-file", str(keys)]
        flags += ["--served-model-name", "tiny"]
        log = work_dir / "soak.log"
        progress(f"starting; the log is {log}")
        server = Gateway(checkpoint, flags, log)
        with server:
            connector = aiohttp.TCPConnector(limit=0)
            headers = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
                traffic = Traffic(session, server.url, images, Random(arguments.seed))
                first = await _fixed_answer(traffic)
                await _send_all(server, traffic, arguments)
                checks = await _look(server, traffic, first, arguments)
    return traffic, checks


async def _fixed_answer(traffic: Traffic) -> str:
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 16, "temperature": 0}
    async with traffic.session.post(traffic.url + TEXT, json=body) as answer:
        return str((await answer.json())["choices"][0]["text"])


async def _send_all(server: Gateway, traffic: Traffic, arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    started = 0
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # what there is by then is still reported
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    def over() -> bool:
        return stopped.is_set() or time.monotonic() - begun > arguments.max_seconds

    async def work() -> None:
        nonlocal started
        while started < arguments.requests and not over():
            started += 1
            await traffic.send_one()

    async def sample() -> None:
        told = 0.0
        while True:
            seconds = time.monotonic() - begun
            sizes = server.memory()
            traffic.memory.append((traffic.done, seconds, sizes))
            if seconds - told > 10:
                told = seconds
                share = traffic.done / arguments.requests
                told_sizes = ", ".join(f"{name} {size >> 20} MiB" for name, size in sizes.items())
                progress(f"{traffic.done} requests ({share:.0%}), {seconds:.0f} s: {told_sizes}")
            await asyncio.sleep(SAMPLE_SECONDS)

    sampling = asyncio.create_task(sample())
    try:
        await asyncio.gather(*(work() for _ in range(arguments.concurrency)))
    finally:
        sampling.cancel()


async def _look(
    server: Gateway, traffic: Traffic, first: str, arguments: argparse.Namespace
) -> list[Check]:
    names = ("himap_requests_in_flight", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + IDLE_SECONDS
    while any(left := {name: server.metric(name) for name in names}.values()):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    async with traffic.session.get(f"{traffic.url}/health/ready") as answer:
        ready = answer.status
    again = await _fixed_answer(traffic)
    statuses: Counter[int] = sum(traffic.outcomes.values(), Counter())
    errors = {status: number for status, number in statuses.items() if status >= 500}
    errors.pop(503, None)
    unexpected = sum(
        number
        for name, counts in traffic.outcomes.items()
        for status, number in counts.items()
        if status not in ALLOWED[name.partition(":")[0]]
    )
    checks = [
        Check("all requests were sent", traffic.done == arguments.requests, str(traffic.done)),
        Check("ready", ready == 200, str(ready)),
        Check("no request in flight or running, KV cache empty", not any(left), str(list(left))),
        Check("a good request is answered as before", again == first, ascii(again)),
        Check("no 5xx but 503", not errors, str(errors or "none")),
        Check("every answer is one that its request may have", not unexpected, str(unexpected)),
    ]
    if traffic.done < (WARM_UP + WINDOW) * arguments.requests:
        return checks  # stopped too early; the first check says so
    for process in traffic.memory[-1][2]:
        begin, end = _sizes(traffic, process, arguments.requests)
        growth = end / begin - 1
        checks.append(
            Check(
                f"{process}: at most {GROWTH_ALLOWED:.0%} larger than after the warm-up",
                growth <= GROWTH_ALLOWED,
                f"{begin / 2**20:.0f} to {end / 2**20:.0f} MiB ({growth:+.1%})",
            )
        )
    return checks


def _sizes(traffic: Traffic, process: str, requests: int) -> tuple[float, float]:
    """Median size right after the warm-up, and in the end."""

    def size(begin: float, end: float) -> float:
        return median(
            sizes[process]
            for done, _, sizes in traffic.memory
            if begin * requests <= done <= end * requests
        )

    # The end is where it ended, even if time was up before all was sent.
    reached = traffic.memory[-1][0] / requests
    return size(WARM_UP, WARM_UP + WINDOW), size(reached - WINDOW, reached)


def report(traffic: Traffic, checks: list[Check], requests: int) -> str:
    """In Markdown."""
    outcomes = [
        [name, str(sum(counts.values())), ", ".join(f"{s}: {n}" for s, n in sorted(counts.items()))]
        for name, counts in sorted(traffic.outcomes.items())
    ]
    processes = list(traffic.memory[0][2])
    memory = []
    for tenth in range(11):
        at = next((m for m in traffic.memory if m[0] >= tenth * requests / 10), traffic.memory[-1])
        sizes = [f"{at[2].get(name, 0) / 2**20:.0f}" for name in processes]
        memory.append([str(at[0]), f"{at[1]:.0f}", *sizes])
    verdicts = [[check.claim, "yes" if check.passed else "**no**", check.found] for check in checks]
    parts = [
        table(["request", "number", "statuses"], outcomes),
        table(["requests", "s", *(f"{name}, MiB" for name in processes)], memory),
        table(["check", "passed", "found"], verdicts),
    ]
    if traffic.surprises:
        parts.append("\n".join(["Surprises, the first of them:", "", *traffic.surprises]))
    return "\n\n".join(parts)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=3600)
    parser.add_argument("--work-dir", type=Path, help="default: a temporary directory")
    arguments = parser.parse_args()
    if arguments.requests < 300:
        parser.error("--requests: at least 300, for the samples of memory to mean something")
    work_dir = arguments.work_dir or Path(tempfile.mkdtemp(prefix="himap-soak-"))
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = build_llava(work_dir / "soak-model", image_size=84)
    traffic, checks = asyncio.run(soak(arguments, checkpoint, work_dir))
    print(report(traffic, checks, arguments.requests))
    return int(not all(check.passed for check in checks))


if __name__ == "__main__":
    sys.exit(main())
