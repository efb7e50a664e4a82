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

What the gateway may cost by counting is in `bench/results/gateway-cpu-2-cores.md`.

Prints Markdown; `--output` keeps it, with every raw number. $OPENAI_API_KEY, if set, is sent with
all requests, for a gateway that wants keys. The servers' logs and the checkpoint stay in
`--work-dir`.
"""

from __future__ import annotations

import argparse
import json
import operator
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import contest
from bench.contest import CHUNKS, GATEWAY, METRICS, MODEL, PARTIES, SERVERS, TTFT, VLLM
from bench.samples import Samples
from bench.tables import (
    Check,
    environment,
    number,
    progress,
    report,
    run_parser,
    table,
    verdicts,
    versions,
)

TTFT_ALLOWED_MS = 2.0
CHUNKS_WANTED = 0.95


@dataclass(frozen=True)
class Results:
    """Everything measured, with what is needed to read it."""

    description: dict[str, Any]
    samples: Samples


def checks(samples: Samples) -> list[Check]:
    """The claims the benchmark is there to test."""
    found = []
    for name, generator in samples.loads():
        load, where = (name, generator), f"{name} ({generator})"
        if samples.rounds(CHUNKS, load, VLLM):
            share = samples.compare(CHUNKS, load, GATEWAY, VLLM)
            claim = f"{where}: at least {CHUNKS_WANTED:.0%} of vllm serve's chunks/s"
            found.append(Check(claim, share.median >= CHUNKS_WANTED, share.show()))
        elif samples.rounds(TTFT, load, VLLM):
            more = samples.compare(TTFT, load, GATEWAY, VLLM, operator.sub)
            claim = f"{where}: at most {TTFT_ALLOWED_MS:g} ms more to the first token"
            found.append(Check(claim, more.median <= TTFT_ALLOWED_MS, f"{more.show('+.2f')} ms"))
    return found


def _comparison(samples: Samples) -> str:
    rows = [
        [
            *load,
            label,
            *(number(samples.median(metric, load, server), digits) for server in SERVERS),
            samples.compare(metric, load, GATEWAY, VLLM, operator.sub).show(f"+.{digits}f"),
            samples.compare(metric, load, GATEWAY, VLLM).show(),
        ]
        for load in samples.loads()
        for metric, (label, digits) in METRICS.items()
        if samples.rounds(metric, load, VLLM)
    ]
    return table(["load", "generator", "", *SERVERS, "difference", "ratio"], rows)


def _cores(samples: Samples) -> str:
    rows = []
    for load in samples.loads():
        for server in SERVERS:
            cores = [samples.median(party, load, server) for party in PARTIES]
            if any(cores):
                shares = ("" if share is None else number(share, 2) for share in cores)
                rows.append([*load, server, *shares])
    return table(["load", "generator", "server", *PARTIES], rows)


def _setting(description: dict[str, Any]) -> str:
    machine, model = description["environment"], description["model"]
    aiperf = "" if description["aiperf"] else " AIPerf did not run: --aiperf was not given."
    stopped = f" Ended early, by {end}." if (end := description["stopped"]) else ""
    again = "".join(f" Repeated after a failure: {load}." for load in description["repeated"])
    flags = description["gateway_flags"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {versions(machine)}. "
        f"{model['num_layers']} layers of width {model['hidden_size']}, {contest.DTYPE}, eager; "
        f"pictures of {model['image_tokens']} tokens, pruned by {contest.PRUNING}. "
        + (f"Flags of himap serve: `{shlex.join(flags)}`. " if flags else "")
        + f"{description['rounds']} rounds. Medians of rounds; differences and ratios are medians "
        f"of the rounds' own, with lowest and highest.{aiperf}{again}{stopped}"
    )


def markdown(results: Results) -> str:
    """The report."""
    return report({
        "Setting": _setting(results.description),
        "himap serve against vllm serve": _comparison(results.samples),
        "Cores kept busy": _cores(results.samples),
        "Checks": verdicts(checks(results.samples)),
    })  # fmt: skip


def run(args: argparse.Namespace) -> Results:
    """Start both servers and measure everything."""
    began = time.monotonic()
    work_dir: Path = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    flags = {VLLM: shlex.split(args.vllm_flags), GATEWAY: shlex.split(args.gateway_flags)}
    checkpoint = MODEL.checkpoint(work_dir)
    servers = {
        name: contest.Contestant(name, checkpoint, flags[name], work_dir) for name in SERVERS
    }
    with ExitStack() as running:
        for name, server in servers.items():
            progress(f"starting {name}")
            running.enter_context(server)
        bench = contest.Bench(servers, checkpoint, work_dir, args.aiperf)
        bench.check_pruning()
        progress("warming up")
        loads = contest.QUICK if args.quick else contest.FULL
        bench.warm_up(loads)
        samples = Samples()
        stopped = ""
        try:
            for index in range(args.rounds):
                aiperf = bool(args.aiperf) and index < args.aiperf_rounds
                samples += bench.round(loads, index, args.blocks, aiperf)
                progress(f"round {index + 1} of {args.rounds} done")
        except BaseException as error:  # SIGTERM and Ctrl-C, too: whole rounds are worth keeping
            if not samples:
                raise
            stopped = f"{type(error).__name__}: {error}"
            progress(stopped)
    return Results(
        description={
            "environment": environment(),
            "model": MODEL.as_dict(),
            "pruning": contest.PRUNING,
            "commands": {name: server.command for name, server in servers.items()},
            "gateway_flags": flags[GATEWAY],
            "rounds": 1 + max(sample.round_index for sample in samples),
            "stopped": stopped,
            "loads": [traffic._asdict() for traffic in loads],
            "aiperf": args.aiperf,
            "repeated": bench.repeated,
            "seconds": time.monotonic() - began,
        },
        samples=samples,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = run_parser("bench.gateway", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smoke run: two rounds, short loads")
    add("--rounds", type=int, help="(default 6; quick: 2)")
    add(
        "--blocks",
        type=int,
        help=f"of {contest.BLOCK_SIZE} requests, per round (default 6; quick: 2)",
    )
    add("--aiperf", default="", help="the aiperf command; without, it is left out")
    add("--aiperf-rounds", type=int, default=3, help="it is slow to start (default 3)")
    add("--gateway-flags", default="", help="more flags of himap serve, quoted")
    add("--vllm-flags", default="", help="more flags of vllm serve, quoted")
    add("--output", type=Path, help="folder for gateway.md and gateway.json, all raw numbers")
    add("--check", action="store_true", help="exit with 1 unless all checks pass")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (2 if args.quick else 6)
    args.blocks = args.blocks or (2 if args.quick else 6)
    results = run(args)
    found = checks(results.samples)
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
