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
from dataclasses import dataclass, field
from typing import Any

from bench.model import Cuts, Model
from himap_vllm.config import ADDITIONAL_CONFIG_KEY, DEEP_ARG, SHALLOW_ARG

MAX_SEQS = 128
BATCHED_TOKENS = 8192  # per step
CAPTURED_TOKENS = 512  # of the largest CUDA graph: vLLM's default with 256 sequences or more


@dataclass(frozen=True)
class Options:
    """Of an engine.

    Attributes:
        shape: of the model.
        checkpoint: directory of it.
        cuts: None for stock vLLM.
        kv_bytes: KV cache.
        num_images: different images; more than run at once and fit the encoder's cache.
        warm_up: loads that leave nothing to be compiled, loaded or allocated while it is measured.
        arguments: further ones of `AsyncEngineArgs`.
    """

    shape: Model
    checkpoint: str
    cuts: Cuts | None
    kv_bytes: int
    num_images: int
    warm_up: tuple[Load, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """So many requests, so many of them at a time, all alike but for their image.

    Attributes:
        ratios: (R1, R2) asked for by each request; None: nothing is asked for.
        text_tokens: of the prompt, beside the image's.
        same_image: what the tower made of it is found in the encoder's cache: what is left is the
            decoder's part.
    """

    concurrency: int
    num_requests: int
    text_tokens: int
    output_tokens: int
    ratios: tuple[float, float] | None = None
    same_image: bool = False


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


@dataclass(frozen=True)
class _Timeline:
    began: float
    tokens: list[float]
    prefill: float


class Engine:
    """Call `start` and `warm_up` first."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._turn = itertools.count()
        self._requests = itertools.count()
        self._engine: Any = None
        self._images: list[Any] = []

    async def start(self) -> float:
        """Start the engine; the seconds that took."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        began = time.perf_counter()
        options = self._options
        additional: dict[str, Any] = {}
        if options.cuts is not None:
            additional[ADDITIONAL_CONFIG_KEY] = {
                "shallow_layer": options.cuts.shallow_layer,
                "deep_layer": options.cuts.deep_layer,
                "shallow_ratio": 0,
                "deep_ratio": 0,
            }
        arguments = {
            "model": options.checkpoint,
            "load_format": "dummy",
            "max_model_len": 1024,
            "max_num_seqs": MAX_SEQS,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "max_cudagraph_capture_size": CAPTURED_TOKENS,
            "kv_cache_memory_bytes": options.kv_bytes,
            "gpu_memory_utilization": 0.05,  # only checked: the line above decides
            "enable_prefix_caching": False,  # prompts are alike
            "limit_mm_per_prompt": {"image": 1},
            "additional_config": additional,
            "worker_extension_cls": "bench.gpu.counters.Counters",
            **options.arguments,
        }
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        return time.perf_counter() - began

    async def warm_up(self) -> float:
        """Show every image once, pruned and not, and fill the caches; the seconds that took."""
        from tests.checkpoints import sample_images

        began = time.perf_counter()
        count, size = self._options.num_images, self._options.shape.tower.image_size
        self._images = sample_images(count, size=size)
        await self.load(Load(min(count, 32), count, 35, 2))
        if self._options.cuts is not None:
            for concurrency in (1, 8):
                await self.load(Load(concurrency, 16, 35, 8, (0.5, 0.75)))
        for load in self._options.warm_up:
            await self.load(load)
        gc.collect()
        gc.freeze()
        return time.perf_counter() - began

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
        if self._options.cuts is None:
            return 0
        return int((await self.rpc("himap_stats"))["steps"])

    async def different(self, count: int) -> None:
        """Requests no two of which are alike in length or, with the plugin, in ratios."""
        shares = [(index + 1) / (count + 2) for index in range(count)]
        loads = [
            Load(1, 1, 20 + 3 * index, 2, (share, 1 - share) if self._options.cuts else None)
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
                1000 * (t.tokens[-1] - t.tokens[0]) / (len(t.tokens) - 1)
                for t in timelines
                if len(t.tokens) > 1
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
        wanted = self._options.shape.image_tokens + load.text_tokens
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
