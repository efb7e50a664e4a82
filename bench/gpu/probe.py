# SPDX-License-Identifier: Apache-2.0
"""What the device can do, and what scoring alone costs on it; lives in a `Worker`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.model import Cuts, Model, Peaks

if TYPE_CHECKING:
    import torch


class Probe:
    """Measurements without an engine."""

    def __init__(self, device: str) -> None:
        import torch
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # A cut asks how many ranks share its heads.
        self._folder = tempfile.TemporaryDirectory()
        backend = "nccl" if device == "cuda" else "gloo"
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{self._folder.name}/ranks", 0, backend)
            initialize_model_parallel()

    def close(self) -> None:
        """Leave the group of one rank."""
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        self._folder.cleanup()

    def peaks(self) -> tuple[str, Peaks]:
        """Name of the device, and its measured peaks.

        An 8192-cube product of random bfloat16 matrices (zeros draw less power and run faster);
        a copy within the device's memory, counted as read and written, or, as decoding hardly
        writes, a sum that only reads: whichever is faster.
        """
        import torch

        small = self._device.type != "cuda"
        name = "CPU" if small else torch.cuda.get_device_name()
        size, elements = (512, 1 << 22) if small else (8192, 1 << 31)
        a, b = (torch.randn(size, size, device=self._device, dtype=self._dtype) for _ in range(2))
        product = self._median_seconds(lambda: a @ b, 20)
        source = torch.zeros(elements, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        copy = self._median_seconds(lambda: target.copy_(source), 20)
        numbers = source.view(torch.float32)
        read = self._median_seconds(lambda: numbers.sum(), 20)
        bandwidth = max(2 * elements / copy, elements / read)
        return name, Peaks(flops=2 * size**3 / product, bandwidth=bandwidth)

    def scoring(
        self, shape: Model, cuts: Cuts, text_tokens: int, prompts: int, times: int = 20
    ) -> dict[str, float]:
        """Milliseconds, for a step of `prompts` pruned prompts; medians of `times` steps.

        Returns:
            `device_ms`: both cuts, back to back on an idle device: scores, selection, gathers;
            `launch_ms`: host time to upload the step's arrays and to launch all of it.
        """
        import torch

        from himap_vllm.kernels.gather import gather_rows
        from himap_vllm.kernels.importance import KeyPages
        from himap_vllm.plan.prompt import ImageTokens, make_plan
        from himap_vllm.plan.step_layout import plan_step
        from himap_vllm.pruning.pruning_step import PruningStep

        length, size = shape.image_tokens + text_tokens, shape.hidden_size // shape.num_heads
        images = [ImageTokens(((1, 1 + shape.image_tokens),))]
        plan = make_plan(length, images, cuts.ratios)
        step_plan = plan_step([0] * prompts, [length] * prompts, [plan] * prompts)
        inputs = [self._random(shape, stage.num_tokens) for stage in step_plan.stages[:2]]
        positions = torch.arange(length, device=self._device).repeat(prompts)
        nothing_cached = KeyPages(
            inputs[0][1].new_empty(1, shape.num_heads, 16, size),
            torch.zeros(prompts, 1, dtype=torch.int32, device=self._device),
        )

        def cut_twice(step: PruningStep) -> None:
            moved = positions
            for index, (query, key, hidden) in enumerate(inputs):
                step.cuts[index].score(query, key, size**-0.5, lambda *_: nothing_cached)
                moved, _, _ = gather_rows(step.cut(index), moved, hidden, hidden)

        device, launch = [], []
        warm_up = min(5, times)
        for _ in range(warm_up + times):
            began = time.perf_counter()
            step = PruningStep(step_plan, self._device)
            built = time.perf_counter() - began
            self._wait()

            def timed(step: PruningStep = step, built: float = built) -> None:
                began = time.perf_counter()
                cut_twice(step)
                launch.append(built + time.perf_counter() - began)

            device.append(self._seconds(timed))
            self._wait()
        return {
            "device_ms": 1000 * statistics.median(device[warm_up:]),
            "launch_ms": 1000 * statistics.median(launch[warm_up:]),
        }

    def _random(
        self, shape: Model, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and hidden states of a step."""
        import torch

        device, dtype = self._device, self._dtype
        fused = torch.randn(num_tokens, 3 * shape.hidden_size, device=device, dtype=dtype)
        query, key, _ = (
            part.view(num_tokens, shape.num_heads, -1) for part in fused.chunk(3, dim=1)
        )
        hidden = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=dtype)
        return query, key, hidden

    def _median_seconds(self, function: Callable[[], Any], times: int) -> float:
        for _ in range(3):
            function()
        return statistics.median(self._seconds(function) for _ in range(times))

    def _seconds(self, function: Callable[[], Any]) -> float:
        """Time on the device (on a CPU: of the call)."""
        import torch

        if self._device.type != "cuda":
            began = time.perf_counter()
            function()
            return time.perf_counter() - began
        # Busy for some milliseconds, so that what follows is launched before it is begun.
        torch.cuda._sleep(10_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _wait(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()
