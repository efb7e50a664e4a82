# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning on one GPU: `python -m bench.gpu`, one call, no network.

Two engines run side by side, one with the plugin and one without, and loads alternate between them,
one at a time. It keeps to a time budget: the most important loads come first, and repetitions go on
until the time is up. What failed or was left out is listed. README.md says what is measured and
what is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.capacity import Setting, measure
from bench.gpu import counting
from bench.gpu.engine import Engine
from bench.gpu.plan import ENGINES, PLUGIN, PREFILL, TTFT, Load, Plan, System, kv_bytes_for, tiny
from bench.gpu.probe import Probe
from bench.gpu.report import markdown
from bench.gpu.results import Results
from bench.model import NOMINAL
from bench.samples import UNPRUNED, Sample, turns
from bench.tables import environment, progress, run_parser
from bench.worker import Worker

BUDGET_SECONDS = 470.0
GRACE_SECONDS = 15.0  # for what runs when the time is up
CALL_SECONDS = 60.0  # for one question while counting
START_SECONDS = 330.0  # for an engine: one that hangs must not use up the budget
LOG_END_BYTES = 50_000
# For all processes. FlashInfer is not in the bundle, and vLLM imports it for its sampler of top-k
# and top-p unless told not to; greedy decoding, which is all that is measured, never calls it.
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM looks for it by way of the network
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Run:
    """One run and what came out of it."""

    def __init__(self, plan: Plan, work_dir: Path, output: Path) -> None:
        self._plan, self._work_dir, self._output = plan, work_dir, output
        self._deadline = time.monotonic() + plan.budget_seconds
        self._stack = ExitStack()
        self._engines: dict[str, Worker] = {}
        self._taken: dict[tuple[Any, str], float] = {}  # seconds of a load on a system
        self.results = Results(plan=plan, environment=environment())

    def left(self) -> float:
        """Seconds of the budget."""
        return self._deadline - time.monotonic()

    def everything(self) -> None:
        """Measure; whatever fails is noted and the rest goes on."""
        with self._stack:
            self._try("the device", self._probe)
            if self.results.peaks is None and self._plan.device == "cuda":
                self.results.peaks = NOMINAL["NVIDIA H200"]  # rather than no bounds at all
            self._start_engines()
            for index in range(self._plan.rounds):
                if not self._round(index):
                    break
            self.write()  # before anything that may hang
            self._count()
            self.write()
            for engine in self._engines.values():
                engine.stop()  # its memory is needed
            self._capacities()
            self.write()

    def _try(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            text = f"{what}: {error}"
            progress(f"FAILED {text}")
            if text not in self.results.failures:
                self.results.failures.append(text)
            return None

    def _worker(self, name: str, plugins: str, factory: Any, *arguments: Any) -> Worker:
        log = self._work_dir / f"{name}.log"
        worker = Worker(factory, *arguments, log=log, environment={"VLLM_PLUGINS": plugins})
        self._stack.callback(worker.stop)
        return worker

    def _at_once(self, number: int) -> ThreadPoolExecutor:
        """What is mostly compilation on the host: at once on a GPU machine."""
        return ThreadPoolExecutor(1 if self._plan.device == "cpu" else number)

    def _probe(self) -> None:
        plan, results = self._plan, self.results
        progress("measuring the device, and scoring alone")
        probe = self._worker("probe", "", Probe, plan.device)
        results.device, results.peaks = probe.call(self.left(), "peaks")
        results.peaks_measured = True
        results.nominal = NOMINAL.get(results.device)
        for system in plan.systems:
            for prompts in plan.scoring_prompts if system.ratios else ():
                found = self._try(
                    f"scoring, {system.name}, {prompts} prompts",
                    probe.call, self.left(), "scoring",
                    plan.shape, system.cuts(plan), plan.text_tokens[0], prompts,
                )  # fmt: skip
                if found:
                    results.scoring.append({"system": system.name, "prompts": prompts, **found})
        probe.stop()  # its memory is needed

    def _start_engines(self) -> None:
        progress("writing checkpoints (without weights)")
        checkpoint = self._plan.shape.checkpoint(self._work_dir, weights=False)
        with self._at_once(2) as pool:
            started = {name: pool.submit(self._start, name, checkpoint) for name in ENGINES}
        for name, future in started.items():
            if engine := self._try("an engine", future.result):
                self._engines[name] = engine
        for name, engine in self._engines.items():  # alone, not while another starts
            self._try("watching compilations", engine.call, GRACE_SECONDS, "rpc", "bench_watch")
            progress(f"warming up: {name}")
            self._try("warm-up", engine.call, self.left(), "warm_up")

    def _start(self, name: str, checkpoint: Path) -> Worker:
        progress(f"starting the engine {name}")
        plugins = "himap" if name == PLUGIN else ""
        worker = self._worker(name, plugins, Engine, self._plan, name, str(checkpoint))
        seconds = worker.call(min(self.left(), START_SECONDS), "start")
        self.results.start_seconds[name] = seconds
        progress(f"engine {name} started in {seconds:.0f} s")
        return worker

    def _round(self, index: int) -> bool:
        """All loads that there is time for; whether there may be time for more."""
        plan, dropped = self._plan, self.results.dropped
        loads = list(plan.loads())
        skipped = 0
        for part, load in loads:
            name = f"{part}, {load.text_tokens} text tokens, concurrency {load.concurrency}"
            # What follows may be left out before the first times to first token are.
            first = not index and part in (TTFT, PREFILL)
            if self._seconds_needed(part, load) > self.left() - plan.reserve_seconds * (not first):
                skipped += 1
                if not index:
                    dropped.append(f"{name}: not measured")
                continue
            for system in turns(plan.systems, index):
                if system.engine in self._engines:
                    what = f"{part}, {system.name}"
                    self._try(what, self._measure, part, load, system, index)
            progress(f"round {index + 1}: {name}; {self.left():.0f} s left")
            self.write_json()
        if skipped:
            left_out = f"{skipped} of {len(loads)} loads left out, time was up"
            dropped.append(f"round {index + 1} of {plan.rounds}: {left_out}")
        return not skipped or self.left() - plan.reserve_seconds >= 5

    def _seconds_needed(self, part: str, load: Load) -> float:
        """A guess, from what the load's systems, or the latest ones, took."""
        systems = self._plan.systems
        latest = max(list(self._taken.values())[-len(systems) :], default=0.0)
        key = (part, load.text_tokens, load.concurrency)
        return sum(self._taken.get((key, system.name), latest) for system in systems)

    def _measure(self, part: str, load: Load, system: System, index: int) -> None:
        began = time.monotonic()
        engine, own = self._engines[system.engine], replace(load, ratios=system.ratios)
        outcome = engine.call(self.left() + GRACE_SECONDS, "load", own)
        key = (part, load.text_tokens, load.concurrency)
        self._taken[key, system.name] = time.monotonic() - began
        sample = Sample(key, system.name, index, outcome.values(), outcome)
        self.results.samples.append(sample)

    def _count(self) -> None:
        plan, engines, results = self._plan, self._engines, self.results
        if PLUGIN in engines:  # of the rounds, not of what follows
            results.stats = self._try(
                "statistics", engines[PLUGIN].call, 30.0, "rpc", "himap_stats"
            )
        half = plan.reserve_seconds / 2  # for KV capacity

        def ask(engine: str, method: str, *arguments: Any) -> Any:
            seconds = min(CALL_SECONDS, max(1.0, self.left() - half))
            return engines[engine].call(seconds, method, *arguments)

        # What may break an engine comes last. Nothing undoes the watch for waits, but it adds no
        # call to the device.
        on_gpu = (counting.waits, counting.traces) if plan.device == "cuda" else ()
        for part in (counting.recompilation, *on_gpu):
            name = part.__name__
            progress(f"counting: {name}; {self.left():.0f} s left")
            answer = self._try(f"counting: {name}", part, plan, list(engines), ask)
            if answer is not None:
                results.counted[name] = answer

    def _capacities(self) -> None:
        checkpoint = self._plan.kv_shape.checkpoint(self._work_dir, weights=False)
        systems = [system for system in self._plan.systems if system.name != UNPRUNED]
        with self._at_once(3) as pool:
            waiting = [pool.submit(self._capacity, checkpoint, system) for system in systems]
        for future in waiting:
            self._try("KV capacity", future.result)

    def _capacity(self, checkpoint: Path, system: System) -> None:
        plan = self._plan
        # Stock vLLM gets prompts of the length that the first ratios want.
        cuts = (system if system.ratios else plan.systems[2]).cuts(plan)
        setting = Setting(
            image_tokens=plan.kv_shape.image_tokens,
            num_layers=plan.kv_shape.num_layers,
            token_bytes=plan.kv_shape.kv_bytes(plan.dtype),
            kv_bytes=plan.capacity_kv_bytes,
            block_size=16 if plan.device == "cuda" else 32,
            batched_tokens=16384,
            output_tokens=8,
            engine={
                "dtype": plan.dtype,
                "load_format": "dummy",
                "gpu_memory_utilization": 0.05,
                "async_scheduling": False,  # between two steps, all tokens are there
            },
        )
        progress(f"KV capacity: {system.name}")
        log = f"capacity-{'-'.join(map(str, system.ratios or ('stock',)))}.log"
        self.results.capacity[system.name] = measure(
            checkpoint, cuts, system.engine == PLUGIN, self._work_dir / log, setting,
            timeout=max(self.left() + GRACE_SECONDS, 1.0),
        )  # fmt: skip

    def write_json(self) -> None:
        """All raw numbers so far."""
        self.results.seconds = self._plan.budget_seconds - self.left()
        text = json.dumps(asdict(self.results), indent=1)
        (self._output / "results.json").write_text(text + "\n")

    def write(self) -> None:
        """Raw numbers, tables, logs."""
        self.write_json()
        (self._output / "results.md").write_text(markdown(self.results))
        logs = sorted(self._work_dir.glob("*.log"))
        ends = [f"==> {log.name}\n".encode() + log.read_bytes()[-LOG_END_BYTES:] for log in logs]
        (self._output / "logs.txt").write_bytes(b"\n".join(ends))


def _plan(budget: float) -> Plan:
    from vllm.platforms import current_platform

    kv_bytes = kv_bytes_for(current_platform.get_device_total_memory())
    if kv_bytes < 4 << 30:
        raise SystemExit("two engines with a 7B model need a card with 46 GiB or more; try --tiny")
    return Plan(budget, kv_bytes=kv_bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, which is 1 if anything failed."""
    parser = run_parser("bench.gpu", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("."), help="folder for the results")
    add("--budget", type=float, default=BUDGET_SECONDS, help="seconds (default %(default)s)")
    add("--tiny", action="store_true", help="a model too small to judge by, to try the script")
    add("--cache", type=Path, help="what vLLM and Triton compile (default: WORK_DIR/cache)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny only")
    cache = (args.cache or args.work_dir / "cache").absolute()
    caches = {"VLLM_CACHE_ROOT": str(cache / "vllm"), "TRITON_CACHE_DIR": str(cache / "triton")}
    os.environ |= ENVIRONMENT | caches
    plan = tiny(args.device, args.budget) if args.tiny else _plan(args.budget)
    for folder in (args.output, args.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for log in args.work_dir.glob("*.log"):
        log.unlink()
    run = Run(plan, args.work_dir, args.output)
    run.everything()
    print((args.output / "results.md").read_text())
    progress(f"done in {run.results.seconds:.0f} s; results in {args.output}")
    return int(bool(run.results.failures))


if __name__ == "__main__":
    sys.exit(main())
