# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning on one GPU: `python -m bench.gpu`, one call, no network.

LLaVA-1.5-7B in shape, random in weights. Two engines run side by side in this process tree, one
with the plugin and one without, and loads alternate between them, one at a time. Measured: time to
first token of a lone request, time per output token of batches, throughput and latency under
load, KV capacity, scoring; beside them what the device could do at best, from the model's FLOPs
and bytes and from the device's peaks as measured here. Counted at the end: launches, graph
replays, waits for the device, compilations.

Keeps to a time budget: the most important cells come first, and repetitions go on until the time
is up. What failed or was left out is listed. Writes `results.json` after each group of cells,
`results.md`, which is also printed, and `logs.txt`, the ends of all processes' logs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.capacity import Setting, measure
from bench.environment import environment
from bench.gpu.counting import Counting
from bench.gpu.engine import Engine, Options
from bench.gpu.plan import PREFILL, TTFT, Plan, System, full, seconds_needed, tiny
from bench.gpu.probe import Probe
from bench.gpu.report import markdown
from bench.gpu.results import Results
from bench.model import NOMINAL
from bench.report import UNPRUNED
from bench.tables import progress
from bench.worker import Worker, WorkerError

BUDGET_SECONDS = 470.0
GRACE_SECONDS = 15.0  # for what runs when the time is up
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
        self._plan = plan
        self._work_dir = work_dir
        self._output = output
        self._deadline = time.monotonic() + plan.budget_seconds
        self._stack = ExitStack()
        self.results = Results(plan=plan, environment=environment())

    def left(self) -> float:
        """Seconds of the budget."""
        return self._deadline - time.monotonic()

    def everything(self) -> None:
        """Measure; whatever fails is noted and the rest goes on."""
        plan = self._plan
        with self._stack:
            self._try("the device", self._probe)
            if self.results.peaks is None and plan.device == "cuda":
                self.results.peaks = NOMINAL["NVIDIA H200"]  # rather than no bounds at all
            progress("writing checkpoints (without weights)")
            checkpoint = plan.shape.checkpoint(self._work_dir, weights=False)
            kv_checkpoint = plan.kv_shape.checkpoint(self._work_dir, weights=False)
            # Starting is mostly compilation on the host: at once on a GPU machine.
            with ThreadPoolExecutor(1 if plan.device == "cpu" else 2) as pool:
                started = {
                    plugin: pool.submit(self._start, plugin, checkpoint) for plugin in (False, True)
                }
            engines = {
                plugin: engine
                for plugin, future in started.items()
                if (engine := self._try("an engine", future.result)) is not None
            }
            for engine in engines.values():  # alone, not while another starts
                watch = functools.partial(engine.call, GRACE_SECONDS, "rpc", "bench_watch")
                self._try("watching compilations", watch)
                self._try("warm-up", functools.partial(self._warm_up, engine))
            self._rounds(engines)
            self.write()  # before anything that may hang
            self._count(engines)
            self.write()
            for engine in engines.values():
                engine.stop()  # its memory is needed
            with ThreadPoolExecutor(1 if plan.device == "cpu" else 3) as pool:
                waiting = [
                    pool.submit(self._capacity, kv_checkpoint, system)
                    for system in plan.systems
                    if system.name != UNPRUNED
                ]
            for future in waiting:
                self._try("KV capacity", future.result)
            self.write()

    def _try(self, what: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            self._failed(what, error)
            return None

    def _failed(self, what: str, error: Exception) -> None:
        text = f"{what}: {error}"
        progress(f"FAILED {text}")
        if text not in self.results.failures:
            self.results.failures.append(text)

    def _worker(self, factory: Any, *arguments: Any, name: str, plugins: str) -> Worker:
        worker = Worker(
            factory,
            *arguments,
            log=self._work_dir / f"{name}.log",
            environment={"VLLM_PLUGINS": plugins},
        )
        self._stack.callback(worker.stop)
        return worker

    def _probe(self) -> None:
        plan = self._plan
        progress("measuring the device, and scoring alone")
        probe = self._worker(Probe, plan.device, name="probe", plugins="")
        name, peaks = probe.call(self.left(), "peaks")
        self.results.device = name
        self.results.peaks = peaks
        self.results.peaks_measured = True
        self.results.nominal = NOMINAL.get(name)
        progress(f"{name}: {peaks.flops / 1e12:.0f} TFLOP/s, {peaks.bandwidth / 1e12:.2f} TB/s")
        for system in plan.systems:
            for prompts in plan.scoring_prompts if system.ratios else ():
                found = self._try(
                    f"scoring, {system.name}, {prompts} prompts",
                    functools.partial(
                        probe.call,
                        self.left(), "scoring",
                        plan.shape, system.cuts(plan), plan.text_tokens[0], prompts,
                    ),
                )  # fmt: skip
                if found:
                    self.results.scoring.append(
                        {"system": system.name, "prompts": prompts, **found}
                    )
        probe.stop()  # its memory is needed

    def _capacity(self, checkpoint: Path, system: System) -> None:
        plan = self._plan
        # Stock vLLM gets prompts of the length that the first ratios want.
        cuts = (system if system.ratios else plan.systems[2]).cuts(plan)
        on_gpu = plan.device == "cuda"
        dtype = "bfloat16" if on_gpu else "float32"
        setting = Setting(
            image_tokens=plan.kv_shape.image_tokens,
            num_layers=plan.kv_shape.num_layers,
            token_bytes=plan.kv_shape.kv_bytes(dtype),
            kv_bytes=plan.capacity_kv_bytes,
            block_size=16 if on_gpu else 32,
            batched_tokens=16384,
            output_tokens=8,
            engine={
                "dtype": dtype,
                "load_format": "dummy",
                "gpu_memory_utilization": 0.05,
                "async_scheduling": False,  # between two steps, all tokens are there
            },
        )
        name = "-".join(map(str, system.ratios or ("stock",)))
        progress(f"KV capacity: {system.name}")
        self.results.capacity[system.name] = measure(
            checkpoint, cuts, system.plugin, self._work_dir / f"capacity-{name}.log", setting,
            timeout=max(self.left() + GRACE_SECONDS, 1.0),
        )  # fmt: skip

    def _start(self, plugin: bool, checkpoint: Path) -> Worker:
        plan = self._plan
        cuts = plan.systems[-1].cuts(plan) if plugin else None
        arguments: dict[str, Any] = {"dtype": "bfloat16"}
        if plan.device == "cpu":
            arguments = {"dtype": "float32"}
        options = Options(
            plan.shape, str(checkpoint), cuts, plan.kv_bytes, plan.num_images,
            plan.warm_up(plugin), {**arguments, "max_num_seqs": plan.max_seqs},
        )  # fmt: skip
        name = "himap" if plugin else "stock"
        progress(f"starting the engine {name}")
        worker = self._worker(Engine, options, name=name, plugins="himap" if plugin else "")
        seconds = worker.call(min(self.left(), START_SECONDS), "start")
        self.results.start_seconds[name] = seconds
        progress(f"engine {name} started in {seconds:.0f} s")
        return worker

    def _warm_up(self, engine: Worker) -> None:
        seconds = engine.call(self.left(), "warm_up")
        progress(f"warmed up in {seconds:.0f} s: {engine.log.stem}")

    def _rounds(self, engines: dict[bool, Worker]) -> None:
        plan, results = self._plan, self.results
        taken: dict[tuple[str, str, int, int], float] = {}
        for index in range(plan.rounds):
            skipped = 0
            for group in plan.groups(index):
                # What follows may be left out before the first times to first token are.
                first = not index and group[0].part in (TTFT, PREFILL)
                reserve = 0.0 if first else plan.reserve_seconds
                if seconds_needed(group, taken) > self.left() - reserve:
                    skipped += 1
                    if not index:
                        load = group[0].load
                        results.dropped.append(
                            f"{group[0].part}, {load.text_tokens} text tokens, concurrency "
                            f"{load.concurrency}: not measured"
                        )
                    continue
                for cell in group:
                    engine = engines.get(cell.system.plugin)
                    if engine is None:
                        continue
                    began = time.monotonic()
                    try:
                        outcome = engine.call(self.left() + GRACE_SECONDS, "load", cell.load)
                    except WorkerError as error:
                        self._failed(f"{cell.part}, {cell.system.name}", error)
                        continue
                    taken[cell.key] = time.monotonic() - began
                    results.add(cell, outcome)
                load = group[0].load
                progress(
                    f"round {index + 1}: {group[0].part}, {load.text_tokens} text tokens, "
                    f"concurrency {load.concurrency}; {self.left():.0f} s left"
                )
                self.write_json()
            if skipped:
                results.dropped.append(
                    f"round {index + 1} of {plan.rounds}: {skipped} of "
                    f"{len(list(plan.loads()))} loads left out, time was up"
                )
                if self.left() - plan.reserve_seconds < 5:
                    break

    def _count(self, engines: dict[bool, Worker]) -> None:
        if True in engines:  # of the rounds, not of what follows
            self.results.stats = self._try(
                "statistics", lambda: engines[True].call(30.0, "rpc", "himap_stats")
            )
        half = self._plan.reserve_seconds / 2  # for KV capacity
        for name, part in Counting(self._plan, engines, lambda: self.left() - half).parts():
            progress(f"counting: {name}; {self.left():.0f} s left")
            answer = self._try(f"counting: {name}", part)
            if answer is not None:
                self.results.counted[name] = answer

    def write_json(self) -> None:
        """All raw numbers so far."""
        self.results.seconds = self._plan.budget_seconds - self.left()
        text = json.dumps(self.results.as_dict(), indent=1)
        (self._output / "results.json").write_text(text + "\n")

    def write(self) -> None:
        """Raw numbers, tables, logs."""
        self.write_json()
        (self._output / "results.md").write_text(markdown(self.results))
        logs = sorted(self._work_dir.glob("*.log"))
        ends = [f"==> {log.name}\n".encode() + log.read_bytes()[-LOG_END_BYTES:] for log in logs]
        (self._output / "logs.txt").write_bytes(b"\n".join(ends))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, which is 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, help="seconds (default %(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a model too small to judge by, to try the script"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for what vLLM and Triton compile, for the next run (default WORK_DIR/cache)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "himap-bench-gpu",
        help="checkpoints and logs (default %(default)s)",
    )
    args = parser.parse_args(arguments)
    cache = (args.cache or args.work_dir / "cache").absolute()
    os.environ |= {
        **ENVIRONMENT,
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny only")
    plan = tiny(args.device, args.budget) if args.tiny else full(args.budget)
    for folder in (args.output, args.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for log in args.work_dir.glob("*.log"):
        log.unlink()
    # Terminated, too, this process stops its engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run(plan, args.work_dir, args.output)
    run.everything()
    print((args.output / "results.md").read_text())
    progress(f"done in {run.results.seconds:.0f} s; results in {args.output}")
    return int(bool(run.results.failures))


if __name__ == "__main__":
    sys.exit(main())
