# SPDX-License-Identifier: Apache-2.0
"""Host time of a decode step, with and without pruning: `python -m bench.host`.

64 requests decode on a decoder of 32 layers. A step is what the engine core does for one token of
each: schedule, prepare, sample, update. The forward pass and Triton's kernels are work of the
device, and here the results of an earlier step replace them: computing them on the measured core
would empty its caches. Putting these results in place is not counted. Time is the CPU time of the
engine's thread, which hardly depends on other load of the machine.

Each engine runs in a process of its own; Model Runner V2 runs under Triton's interpreter. The
requests have images; `himap, pruned` keeps a half and an eighth of their tokens, `himap, ratios 0`
prunes none.

* `vllm.v1.engine.core.EngineCore.step` (called): one step at a time, timed on its own thread.
  Remove when: vLLM reports the host time of a step.
* `vllm.v1.core.sched.scheduler.Scheduler.schedule`,
  `vllm.v1.core.sched.scheduler.Scheduler.update_from_output` (wrapped): the scheduler's part of a
  step. Remove when: vLLM reports the host time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

# First: it sets Triton's interpreter up, before anything imports Triton.
from tests.engines import BLOCK_SIZE, Case, Engine

# isort: split
import torch

from bench.report import CELLS
from bench.samples import PRUNED, STOCK
from bench.tables import environment, table
from himap_vllm.config import EngineSettings
from himap_vllm.plan.cuts import KVGrouping
from tests.checkpoints import build_llava, sample_images

RUNNERS = ("V1", "V2")
REQUESTS = 64
WARM_UP = 5
CUTS: dict[str, Any] = {"shallow_layer": 2, "deep_layer": 8}
RATIOS = (0.5, 0.75)
# What is told apart; the rest of a step goes to the runner.
SCHEDULER, KERNELS = "scheduler", "kernels"


class Stopwatch:
    """CPU time of this thread spent in wrapped functions, and how often they were called."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Start a step."""
        self.seconds = dict.fromkeys((SCHEDULER, KERNELS), 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)
        self._inside = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as `name`; what it calls is not counted twice."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - began
                self.calls[name] += 1
                self._inside = False

        return timed


class Replay:
    """Instead of Triton's interpreter: a launch puts where an earlier step's put, what that put.

    What kernels write through pointers that lie in tensors (block tables) stays as it was; the host
    does not read it.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._recorded: list[tuple[str, dict[int, torch.Tensor]]] | None = None
        self._next: Iterator[tuple[str, dict[int, torch.Tensor]]] | None = None

    def start_step(self) -> None:
        """The first step from here on is recorded; later ones replay it."""
        if self._recorded is None:
            self._recorded = []
            return
        assert next(self._next or iter(()), None) is None, "a step with fewer launches"
        self._next = iter(self._recorded)

    def __call__(self, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        name = kernel.fn.__name__
        assert not any(map(torch.is_tensor, kwargs.values())), f"tensors by keyword: {name}"
        if self._next is not None:
            recorded, values = next(self._next)
            assert recorded == name, f"{name} where {recorded} was launched before"
            for index, value in values.items():
                args[index].copy_(value)
            return None
        before = {i: arg.clone() for i, arg in enumerate(args) if torch.is_tensor(arg)}
        result = self._run(kernel, *args, **kwargs)
        if self._recorded is not None:
            changed = (i for i, was in before.items() if not torch.equal(was, args[i]))
            self._recorded.append((name, {i: args[i].clone() for i in changed}))
        return result


def _first_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is only called once."""
    results: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return call


def measure(cell: str, grouping: str, steps: int, checkpoint: Path) -> dict[str, float]:
    """Run one engine in this process; medians over its decode steps."""
    if not (checkpoint / "config.json").exists():
        build_llava(
            checkpoint, image_size=84, patch_size=14,
            num_layers=32, num_heads=2, num_kv_heads=2, hidden_size=64,
        )  # fmt: skip
    options = {
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 1 << 30,
        "limit_mm_per_prompt": {"image": 1},
    }
    settings = None if cell == STOCK else CUTS | {"kv_grouping": grouping}
    engine = Engine(checkpoint, settings, options)
    ratios = None if cell == STOCK else RATIOS if cell == PRUNED else (0.0, 0.0)
    pictures = sample_images(REQUESTS)
    max_tokens = REQUESTS + WARM_UP + steps  # the first request waits for the last one's prompt
    for index, picture in enumerate(pictures):
        # Of different lengths, so that in every step some need a block.
        question = "What?" + "!" * (index % BLOCK_SIZE)
        case = Case(f"USER: <image>\n{question}", (picture,), ratios, max_tokens=max_tokens)
        params = engine.params(case)
        params.logprobs = None
        engine.llm.llm_engine.add_request(str(index), engine.prompt(case), params)
    core = engine.llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    runner = core.model_executor.driver_worker.worker.model_runner
    watch = Stopwatch()
    for name in ("schedule", "update_from_output"):
        setattr(scheduler, name, watch.wrap(SCHEDULER, getattr(scheduler, name)))
    replay = None
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped]

        replay = Replay(InterpretedFunction.run)
        timed = watch.wrap(KERNELS, replay)
        InterpretedFunction.run = lambda kernel, *args, **kwargs: timed(kernel, *args, **kwargs)
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        core.step()
    runner.model.forward = _first_result(runner.model.forward)
    measured = []
    for step in range(WARM_UP + steps):
        watch.reset()
        if replay is not None:
            replay.start_step()
        began = time.thread_time()
        core.step()
        whole = time.thread_time() - began
        if step >= WARM_UP:
            measured.append(
                {
                    "host": whole - watch.seconds[KERNELS],
                    "scheduler": watch.seconds[SCHEDULER],
                    "launches": watch.calls[KERNELS],
                }
            )
    assert len(scheduler.running) == REQUESTS, "requests ended before the last step"
    return {key: median(step[key] for step in measured) for key in measured[0]}


def _in_a_process(runner: str, cell: str, arguments: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.host", "--cell", cell, *arguments]
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if runner == "V2":
        environ["TRITON_INTERPRET"] = "1"
    ended = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The report."""
    rows = [
        [
            f"Model Runner {runner}",
            cell,
            f"{1e6 * of[cell]['host']:.0f}",
            f"{of[cell]['host'] / of[STOCK]['host']:.3f}",
            f"{1e6 * of[cell]['scheduler']:.0f}",
            f"{1e6 * (of[cell]['host'] - of[cell]['scheduler']):.0f}",
            f"{of[cell]['launches']:.0f}" if runner == "V2" else "",
        ]
        for runner, of in results.items()
        for cell in CELLS
    ]
    head = ["", "engine", "host, us", "x stock", "scheduler, us", "runner, us", "kernel launches"]
    return table(head, rows)


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=60, help="measured (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (default 3)")
    parser.add_argument("--runner", choices=RUNNERS, help="only this one")
    parser.add_argument(
        "--kv-grouping",
        choices=get_args(KVGrouping),
        default=EngineSettings().kv_grouping,
        help="of the plugin (default %(default)s)",
    )
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(args.cell, args.kv_grouping, args.steps, args.checkpoint)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "llava"
        arguments = ["--kv-grouping", args.kv_grouping, "--steps", str(args.steps)]
        arguments += ["--checkpoint", str(checkpoint)]
        results: dict[str, dict[str, dict[str, float]]] = {}
        for runner in (args.runner,) if args.runner else RUNNERS:
            rounds = []
            for number in range(args.rounds):
                print(f"{runner}, round {number + 1} of {args.rounds}", file=sys.stderr)
                rounds.append({cell: _in_a_process(runner, cell, arguments) for cell in CELLS})
            results[runner] = {
                cell: min((of[cell] for of in rounds), key=lambda result: result["host"])
                for cell in CELLS
            }
    machine = environment()
    print(f"{machine['cpu']}; vllm {machine['vllm']}; {REQUESTS} decoding requests.\n")
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
