# SPDX-License-Identifier: Apache-2.0
"""Compilations, launches and waits, counted inside vLLM's worker.

vLLM mixes `Counters` into the worker class, of stock and plugin alike (`worker_extension_cls`), and
`collective_rpc` calls its methods by name, on the thread that runs the steps.

* `vllm.compilation.counter.compilation_counter` (read): what vLLM compiles. Remove when: `/metrics`
  has it.
* `vllm.utils.jit_monitor.activate` (called): it makes Triton's hook survive kernels whose constants
  cannot be serialised. Remove when: Triton does.
* `vllm.utils.gpu_sync_debug.enable_gpu_sync_check`,
  `vllm.utils.gpu_sync_debug.with_gpu_sync_check` (called): to switch the check of waits on
  after the timed part. Remove when: vLLM can switch it on while it runs.
* `vllm.utils.gpu_sync_debug._SYNC_CHECK_MODE` (overridden): to switch the same check on. Remove
  when: vLLM can switch it on while it runs.
* `vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.graphs` (read): how many full graphs were
  captured. Remove when: vLLM reports it.
"""

from __future__ import annotations

import bisect
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

# Of the plugin, one of each per cut.
KERNELS = ("_log_totals_kernel", "_vote_kernel", "_gather_kernel")
GRAPH_LAUNCH = "cudaGraphLaunch"
_MARK = "bench: a load"
# Their frames are not the place that waits.
_NOT_PLACES = ("torch", "warnings", "functools", "vllm.utils.gpu_sync_debug", __name__)


@dataclass
class _Traced:
    calls: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    device_ms: float = 0.0

    def add(self, event: Any) -> None:
        """Count a `FunctionEvent`."""
        if event.device_type.name == "CUDA":
            if not event.is_user_annotation:
                self.device_ms += event.time_range.elapsed_us() / 1000
                if event.name in KERNELS:
                    self.kernels[event.name] = self.kernels.get(event.name, 0) + 1
        elif event.name.startswith(("cuda", "cuLaunch")):
            self.calls[event.name] = self.calls.get(event.name, 0) + 1


class Counters:
    """All names begin with `bench_`, as they share the worker's namespace."""

    bench_compiled: Counter[str]
    bench_profiler: Any
    bench_waits: Counter[str]

    def bench_watch(self) -> None:
        """Count the kernels that Triton compiles from now on, loads from its cache included."""
        from vllm.triton_utils import HAS_TRITON

        compiled = self.bench_compiled = Counter[str]()
        if not HAS_TRITON:
            return
        from triton import knobs  # type: ignore[import-untyped]
        from vllm.utils import jit_monitor

        # Makes Triton's hook survive kernels whose constants can't be serialised.
        jit_monitor.activate()
        before = knobs.runtime.jit_post_compile_hook

        def compiled_one(**kwargs: Any) -> Any:
            compiled[getattr(kwargs.get("fn"), "name", "?")] += 1
            return before(**kwargs) if before else None

        knobs.runtime.jit_post_compile_hook = compiled_one

    def bench_compilations(self) -> dict[str, int]:
        """Everything that torch, vLLM and Triton count when they trace or compile."""
        import torch
        from vllm.compilation.counter import compilation_counter

        counts = {f"vllm {name}": count for name, count in asdict(compilation_counter).items()}
        for kind, counter in torch._dynamo.utils.counters.items():
            counts |= {f"dynamo {kind} {name}": count for name, count in counter.items()}
        return counts | {f"triton {name}": n for name, n in self.bench_compiled.items()}

    def bench_full_graphs(self) -> int:
        """Full CUDA graphs that Model Runner V2 has captured."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        return len(runner.cudagraph_manager.graphs)

    def bench_trace_start(self) -> None:
        """Start the profiler; once per engine.

        Beside CUDA graphs a second start may crash or see no kernels (`torch.profiler.profile` has
        workarounds for its own), so one trace holds all loads, with marks between them.
        """
        import torch

        activity = torch.profiler.ProfilerActivity
        self.bench_profiler = torch.profiler.profile(activities=[activity.CPU, activity.CUDA])
        self.bench_profiler.start()

    def bench_trace_mark(self) -> None:
        """Another load follows."""
        import torch

        torch.cuda.synchronize()
        with torch.profiler.record_function(_MARK):
            pass

    def bench_trace_stop(self) -> list[dict[str, Any]]:
        """Stop it.

        Returns:
            By mark, `calls`: of CUDA's functions; `kernels`: launches of `KERNELS`, as the device
            saw them; `device_ms`: time of all kernels and copies.

        Raises:
            RuntimeError: the profiler saw nothing on the device.
        """
        import torch

        torch.cuda.synchronize()
        self.bench_profiler.stop()
        events = self.bench_profiler.events()
        marks = sorted(
            event.time_range.start
            for event in events
            if event.name == _MARK and event.device_type.name == "CPU"
        )
        found = [_Traced() for _ in marks]
        for event in events:
            index = bisect.bisect(marks, event.time_range.start)
            if index:
                found[index - 1].add(event)
        if not any(traced.device_ms for traced in found):
            raise RuntimeError("the profiler saw nothing on the device")
        return [asdict(traced) for traced in found]

    def bench_watch_waits(self) -> None:
        """Note where steps wait for the device, from now on and for good: it slows every step.

        By vLLM's own check, which `VLLM_GPU_SYNC_CHECK` would have on from the start.

        Raises:
            RuntimeError: the check sees nothing.
        """
        import torch
        from vllm.utils import gpu_sync_debug

        waits = self.bench_waits = Counter[str]()

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            text = str(message)
            if "synchronizing CUDA operation" in text or "silently synchronous" in text:
                waits[_place()] += 1

        warnings.simplefilter("always")
        warnings.showwarning = note  # vLLM's hook calls it
        gpu_sync_debug._SYNC_CHECK_MODE = "warn"
        gpu_sync_debug.enable_gpu_sync_check()
        for name in ("execute_model", "sample_tokens"):  # as decorated, had the check been on
            setattr(self, name, gpu_sync_debug.with_gpu_sync_check(getattr(self, name)))
        gpu_sync_debug.with_gpu_sync_check(torch.ones(1, device="cuda").item)()
        if not waits:
            raise RuntimeError("vLLM's check did not see a wait that was there")
        waits.clear()

    def bench_waits_seen(self) -> dict[str, int]:
        """How often, by `module:line`."""
        return dict(self.bench_waits)


def _place() -> str:
    frame: Any = sys._getframe()
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "?")
        if not any(module == name or module.startswith(f"{name}.") for name in _NOT_PLACES):
            break
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"
