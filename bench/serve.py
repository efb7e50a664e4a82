# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning, side by side: `python -m bench.serve`.

Three cells are measured: stock vLLM without the plugin; the plugin with every ratio 0; the plugin
with the given ratios. Two servers run throughout; an idle one takes hardly any CPU time. Short
loads alternate between the cells, so that a slow spell of the machine hits all of them. Ratios are
taken within a round, between cells that saw the same requests minutes apart.

Prints Markdown; `--output` keeps every raw number. The servers' logs and the checkpoint stay in
`--work-dir`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.capacity import measure
from bench.load import Load
from bench.model import DTYPE_BYTES, FULL, QUICK, THIN, Cuts, Model, prefill_bound
from bench.report import CELLS, CLIENT, PREFILL, Results, checks, markdown, mean_prompt_tokens
from bench.samples import PRUNED, STOCK, Sample, Samples, turns
from bench.server import VLLM, Server
from bench.tables import environment, progress, run_parser
from himap_vllm.config import ADDITIONAL_CONFIG_KEY, DEEP_ARG, SHALLOW_ARG
from himap_vllm.plan.prompt import Ratios

CONCURRENCIES = (1, 2, 4, 8, 16)
MAX_SEQS = 16
BLOCK_SIZE = 128  # tokens, vLLM's default on CPU
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}  # has the /reset_* endpoints; local port only
PREFILL_METRIC = "vllm:request_prefill_time_seconds"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    model: Model
    cuts: Cuts
    dtype: str
    concurrencies: tuple[int, ...]
    rounds: int
    text_tokens: int
    output_tokens: int
    seed: int

    def rounds_at(self, concurrency: int) -> int:
        """Fewer where a round has more requests; at least two, to have a spread."""
        return min(self.rounds, max(2, self.rounds // concurrency))

    def load(self, concurrency: int, round_index: int) -> Load:
        """The requests of one round; the same for all cells."""
        number = 3 if concurrency == 1 else max(4, concurrency)
        seed = self.seed + 1000 * concurrency + round_index
        return Load(concurrency, number, self.text_tokens, self.output_tokens, seed)


class Bench:
    """Two running servers and the cells on them."""

    def __init__(self, plan: Plan, checkpoint: Path, work_dir: Path) -> None:
        self._plan, self._checkpoint = plan, checkpoint
        self._log = work_dir / "load.log"
        self._log.unlink(missing_ok=True)
        options = self._server_options()
        himap = json.dumps({ADDITIONAL_CONFIG_KEY: plan.cuts.engine_settings()})
        self.servers = {
            name: Server(
                VLLM,
                checkpoint,
                [*options, *more],
                work_dir / f"server-{name}.log",
                {**DEV_MODE, "VLLM_PLUGINS": plugins},
            )
            for name, plugins, more in (
                ("stock", "", []),
                ("himap", "himap,himap_stats", ["--additional-config", himap]),
            )
        }

    def _server_options(self) -> list[str]:
        plan = self._plan
        # Twice the text, as the load generator's text lengths vary, and the chat template.
        longest = plan.model.image_tokens + 2 * plan.text_tokens + 64 + plan.output_tokens
        num_seqs = max(MAX_SEQS, *plan.concurrencies)
        blocks = (num_seqs + 1) * -(-longest // BLOCK_SIZE)
        kv_bytes = blocks * BLOCK_SIZE * plan.model.num_layers * plan.model.kv_bytes(plan.dtype)
        return [
            "--dtype", plan.dtype,
            "--max-model-len", "1024",
            "--max-num-seqs", str(num_seqs),
            "--max-num-batched-tokens", "2048",
            "--block-size", str(BLOCK_SIZE),
            "--kv-cache-memory-bytes", str(kv_bytes),
            "--limit-mm-per-prompt", '{"image": 1}',
        ]  # fmt: skip

    def measure(self, cell: str, load: Load, round_index: int = 0) -> Sample:
        """Put one load on one cell."""
        server = self.servers["stock" if cell == STOCK else "himap"]
        ratios = self._plan.cuts.ratios
        xargs = {SHALLOW_ARG: ratios.shallow, DEEP_ARG: ratios.deep} if cell == PRUNED else {}
        server.empty_caches()
        asleep = server.histogram(PREFILL_METRIC)
        server.wake()
        # The server counts a request a moment after it has sent its last token.
        before = server.histogram(PREFILL_METRIC, asleep.number + 1)
        result = load.run(server.url, self._checkpoint, xargs, self._log)
        after = server.histogram(PREFILL_METRIC, before.number + load.num_requests)
        values = {metric: float(result[metric]) for metric in CLIENT}
        values[PREFILL] = 1000 * (after.total - before.total) / load.num_requests
        return Sample(load.concurrency, cell, round_index, values, result)

    def warm_up(self) -> None:
        """Run each cell alone and with company, unmeasured: memory is touched, code compiled."""
        plan = self._plan
        for concurrency in (1, 2):
            for cell in CELLS:
                seed = plan.seed + concurrency
                self.measure(cell, Load(concurrency, concurrency, plan.text_tokens, 4, seed))

    def rounds(self) -> Samples:
        """All rounds, cells alternating and taking turns at being first.

        Raises:
            RuntimeError: not exactly the requests that asked for pruning were pruned.
        """
        plan, samples = self._plan, Samples()
        pruned_before = self._pruned()
        for index in range(plan.rounds):
            for concurrency in plan.concurrencies:
                if index < plan.rounds_at(concurrency):
                    load = plan.load(concurrency, index)
                    samples += [self.measure(cell, load, index) for cell in turns(CELLS, index)]
            progress(f"round {index + 1} of {plan.rounds} done")
        pruned = self._pruned() - pruned_before
        asked = sum(s.raw["completed"] for s in samples if s.system == PRUNED)
        if pruned != asked:
            raise RuntimeError(f"{asked} requests asked for pruning, {pruned} were pruned")
        return samples

    def _pruned(self) -> int:
        return int(self.servers["himap"].pruning_stats()["requests"].get("pruned", 0))


def measure_speed(plan: Plan, work_dir: Path) -> Samples:
    """Latency and throughput of all cells."""
    progress("checkpoint")
    bench = Bench(plan, plan.model.checkpoint(work_dir), work_dir)
    with ExitStack() as running:
        # One after the other: two that compile at once take far longer than twice.
        for name, server in bench.servers.items():
            progress(f"starting the {name} server")
            running.enter_context(server)
        progress("warming up")
        bench.warm_up()
        progress(f"measuring, {plan.rounds} rounds")
        return bench.rounds()


def run(plan: Plan, work_dir: Path, capacity: bool) -> Results:
    """Measure everything."""
    work_dir.mkdir(parents=True, exist_ok=True)
    began, blocks = time.monotonic(), {}
    for cell in (STOCK, PRUNED) if capacity else ():
        progress(f"KV cache of {cell}")
        log = work_dir / f"capacity-{cell.split()[-1]}.log"
        blocks[cell] = measure(THIN.checkpoint(work_dir), plan.cuts, cell == PRUNED, log)
    samples = measure_speed(plan, work_dir)
    tokens = mean_prompt_tokens(samples)
    model = plan.model
    return Results(
        description={
            "environment": environment(),
            "model": model.as_dict(),
            "plan": asdict(plan),
            "prompt_tokens": tokens,
            "seconds": time.monotonic() - began,
        },
        samples=samples,
        bound=prefill_bound(tokens, model.image_tokens, model.num_layers, plan.cuts),
        capacity=blocks,
    )


def _parser() -> argparse.ArgumentParser:
    parser = run_parser("bench.serve", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smoke run: a model too small to judge by")
    add("--rounds", type=int, help="at concurrency 1, fewer above (default 6; quick: 2)")
    add("--concurrency", type=int, nargs="+", help="(default 1 2 4 8 16; quick: 1 4)")
    add("--dtype", choices=sorted(DTYPE_BYTES), default="float32")
    add("--shallow-layer", type=int, default=2, help="K1 (default %(default)s)")
    add("--deep-layer", type=int, default=8, help="K2 (default %(default)s)")
    add("--shallow-ratio", type=float, default=0.5, help="R1 (%(default)s)")
    add("--deep-ratio", type=float, default=0.75, help="R2 (%(default)s)")
    add("--text-tokens", type=int, default=35)
    add("--output-tokens", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--no-capacity", action="store_true", help="leave the KV cache part out")
    add("--output", type=Path, help="JSON file for all raw numbers")
    add("--check", action="store_true", help="exit with 1 unless all checks pass")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(arguments)
    plan = Plan(
        model=QUICK if args.quick else FULL,
        cuts=Cuts(args.shallow_layer, args.deep_layer, Ratios(args.shallow_ratio, args.deep_ratio)),
        dtype=args.dtype,
        concurrencies=tuple(sorted(args.concurrency or ((1, 4) if args.quick else CONCURRENCIES))),
        rounds=args.rounds or (2 if args.quick else 6),
        text_tokens=args.text_tokens,
        output_tokens=args.output_tokens,
        seed=args.seed,
    )
    results = run(plan, args.work_dir, capacity=not args.no_capacity)
    found = checks(results)
    if args.output:
        raw = {**asdict(results), "checks": [asdict(check) for check in found]}
        args.output.write_text(json.dumps(raw, indent=1) + "\n")
    print(markdown(results))
    progress(f"done in {results.description['seconds'] / 60:.0f} minutes")
    return int(args.check and not all(check.passed for check in found))


if __name__ == "__main__":
    sys.exit(main())
