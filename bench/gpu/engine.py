# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine and closed-loop load on it; lives in a `Worker`.

vLLM's `AsyncLLM`, which is what its API server drives: engine core in a process of its own,
asynchronous scheduling, compilation and CUDA graphs as vLLM chooses them. HTTP is left out: it
costs both sides the same and would hide what is compared. Image files are decoded and normalised
once, in `warm_up`, as vLLM's processor cache keeps the result. The vision tower runs for every
request: images take turns, and there are more of them than the encoder's cache holds.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.gpu.plan import PLUGIN, Load, Plan
from himap_vllm.config import ADDITIONAL_CONFIG_KEY, DEEP_ARG, SHALLOW_ARG

BATCHED_TOKENS = 8192  # per step
CAPTURED_TOKENS = 512  # of the largest CUDA graph: vLLM's default with 256 sequences or more


@dataclass(frozen=True)
class Outcome:
    """What a load took; one entry per request, in ms.

    Attributes:
        seconds: for all of it.
        ttft_ms: from handing the request in to its first token.
        prefill_ms: from the step that first computes it to its first token, by the engine core's
            clock: tower, decoder, sampling, without tokenizing and queueing.
        tpot_ms: per output token after the first; under load other prompts' prefill is in it.
        latency_ms: to the last token.
        step_ms: per token while all requests decode and none is prefilled; None where there is no
            such time (not all at once, or too few tokens).
    """

    seconds: float
    ttft_ms: list[float]
    prefill_ms: list[float]
    tpot_ms: list[float]
    latency_ms: list[float]
    step_ms: float | None

    def values(self) -> dict[str, float]:
        """Medians, 99th percentiles (of fewer than 100 requests, their slowest) and throughput."""
        found = {"requests_per_second": len(self.ttft_ms) / self.seconds}
        if self.step_ms is not None:
            found["step_ms"] = self.step_ms
        for name in ("ttft", "prefill", "tpot", "latency"):
            if times := getattr(self, f"{name}_ms"):
                found[f"{name}_ms"] = median(times)
                p99 = np.percentile(times, 99, method="inverted_cdf")
                found[f"{name}_p99_ms"] = float(p99)
        return found


class _Timeline(NamedTuple):
    began: float
    tokens: list[float]
    prefill: float


class Engine:
    """Call `start` and `warm_up` first."""

    def __init__(self, plan: Plan, name: str, checkpoint: str) -> None:
        self._plan, self._name, self._checkpoint = plan, name, checkpoint
        self._plugin = name == PLUGIN
        self._turn, self._requests = itertools.count(), itertools.count()
        self._engine: Any = None
        self._images: list[Any] = []

    async def start(self) -> float:
        """Start the engine; the seconds that took."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        began = time.perf_counter()
        plan = self._plan
        himap = plan.systems[-1].cuts(plan).engine_settings()
        arguments = AsyncEngineArgs(
            model=self._checkpoint,
            load_format="dummy",
            dtype=plan.dtype,
            max_model_len=1024,
            max_num_seqs=plan.max_seqs,
            max_num_batched_tokens=BATCHED_TOKENS,
            max_cudagraph_capture_size=CAPTURED_TOKENS,
            kv_cache_memory_bytes=plan.kv_bytes,
            gpu_memory_utilization=0.05,  # only checked: the line above decides
            enable_prefix_caching=False,  # prompts are alike
            limit_mm_per_prompt={"image": 1},
            additional_config={ADDITIONAL_CONFIG_KEY: himap} if self._plugin else {},
            worker_extension_cls="bench.gpu.counters.Counters",
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        return time.perf_counter() - began

    async def warm_up(self) -> None:
        """Show every image once, pruned and not, and fill the caches."""
        from tests.checkpoints import sample_images

        count, size = self._plan.num_images, self._plan.shape.tower.image_size
        self._images = sample_images(count, size=size)
        await self.load(Load(min(count, 32), count, 35, 2))
        if self._plugin:
            for concurrency in (1, 8):
                await self.load(Load(concurrency, 16, 35, 8, (0.5, 0.75)))
        for load in self._plan.warm_up(self._name):
            await self.load(load)
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """End the engine core."""
        if self._engine is not None:
            self._engine.shutdown()

    async def rpc(self, method: str, *arguments: Any) -> Any:
        """What a method of the worker returns."""
        return (await self._engine.collective_rpc(method, args=arguments))[0]

    async def traced(self, loads: list[Load]) -> list[dict[str, Any]]:
        """Of each load, its `Counters.bench_trace_stop`, and the `steps` that pruned."""
        steps = []
        await self.rpc("bench_trace_start")
        for load in loads:
            before = await self._pruning_steps()
            await self.rpc("bench_trace_mark")
            await self.load(load)
            steps.append(await self._pruning_steps() - before)
        found = await self.rpc("bench_trace_stop")
        return [{**seen, "steps": count} for seen, count in zip(found, steps, strict=True)]

    async def _pruning_steps(self) -> int:
        if not self._plugin:
            return 0
        return int((await self.rpc("himap_stats"))["steps"])

    async def different(self, count: int) -> None:
        """Requests no two of which are alike in length or, with the plugin, in ratios."""
        shares = [(index + 1) / (count + 2) for index in range(count)]
        loads = [
            Load(1, 1, 20 + 3 * index, 2, (share, 1 - share) if self._plugin else None)
            for index, share in enumerate(shares)
        ]
        for begin in range(0, count, 4):
            await asyncio.gather(*map(self._request, loads[begin : begin + 4]))

    async def load(self, load: Load) -> Outcome:
        """Put a load on the engine and wait for its end."""
        ids = iter(range(load.num_requests))
        timelines: list[_Timeline] = []

        async def client() -> None:
            for _ in ids:  # shared: each takes the next
                timelines.append(await self._request(load))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.concurrency)))
        seconds = time.perf_counter() - began
        return Outcome(
            seconds=seconds,
            ttft_ms=[1000 * (t.tokens[0] - t.began) for t in timelines],
            prefill_ms=[1000 * t.prefill for t in timelines],
            tpot_ms=[
                1000 * (t.tokens[-1] - t.tokens[0]) / (load.output_tokens - 1)
                for t in timelines
                if load.output_tokens > 1
            ],
            latency_ms=[1000 * (t.tokens[-1] - t.began) for t in timelines],
            step_ms=_step_ms(timelines) if load.concurrency == load.num_requests else None,
        )

    async def _request(self, load: Load) -> _Timeline:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        index = 0 if load.same_image else next(self._turn) % len(self._images)
        # The tokenizer has a token per character and puts <s> in front.
        prompt = {
            "prompt": "<image>" + "x" * (load.text_tokens - 1),
            "multi_modal_data": {"image": self._images[index]},
            "multi_modal_uuids": {"image": f"image-{index}"},
        }
        ratios = None
        if load.ratios is not None:
            ratios = {SHALLOW_ARG: load.ratios[0], DEEP_ARG: load.ratios[1]}
        params = SamplingParams(
            temperature=0,
            max_tokens=load.output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=ratios,
        )
        tokens: list[float] = []
        began = time.perf_counter()
        output: Any = None
        async for output in self._engine.generate(prompt, params, str(next(self._requests))):
            now = time.perf_counter()
            tokens += [now] * len(output.outputs[0].token_ids)
        if len(tokens) != load.output_tokens:
            raise RuntimeError(f"{len(tokens)} of {load.output_tokens} tokens")
        wanted = self._plan.shape.image_tokens + load.text_tokens
        if len(output.prompt_token_ids) != wanted:
            raise RuntimeError(f"a prompt of {len(output.prompt_token_ids)}, not {wanted} tokens")
        metrics = output.metrics
        return _Timeline(began, tokens, metrics.first_token_ts - metrics.scheduled_ts)


def _step_ms(timelines: list[_Timeline], at_least: int = 8) -> float | None:
    begin = max(t.tokens[0] for t in timelines)
    end = min(t.tokens[-1] for t in timelines)
    counts = [sum(begin < moment <= end for moment in t.tokens) for t in timelines]
    if end <= begin or min(counts) < at_least:
        return None
    return 1000 * (end - begin) / (sum(counts) / len(counts))
