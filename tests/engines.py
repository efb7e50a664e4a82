# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, and what they are asked."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from PIL import Image

import tests.environment  # noqa: F401
from himap_vllm.plan.cuts import KVGrouping
from himap_vllm.plan.grouping import choose_grouping

SHALLOW_LAYER, DEEP_LAYER = 2, 8
BLOCK_SIZE = 32  # the smallest that vLLM's CPU attention takes
IMAGE_TOKENS = 36
WARM: dict[str, Any] = {"skip_reading_prefix_cache": False}  # of a `Case`
# 12 layers cut at (2, 8).
GROUPINGS = {
    name: choose_grouping(name, (2, 6, 4), BLOCK_SIZE, BLOCK_SIZE) for name in get_args(KVGrouping)
}
GROUPING = GROUPINGS["balanced"]  # the default


def _stay_frozen() -> None:
    """Stands for `gc.unfreeze`.

    vLLM collects garbage six times as an engine starts, and again as it ends. Over all that the
    tests of a worker have made, each takes seconds.
    """


gc.unfreeze = _stay_frozen


def least_pool(num_tokens: int) -> int:
    """Blocks for one sequence in 12 layers, and the one that vLLM keeps."""
    of_stages = zip(GROUPING.block_sizes, GROUPING.parts, strict=True)
    return 1 + sum(parts * -(-num_tokens // size) for size, parts in of_stages)


@dataclass(frozen=True)
class Case:
    """One request: `ratios` None sends none. A ratio is a number, or a tuple: of each image.

    `votes` None sends none, which is "turn".
    """

    prompt: str
    images: tuple[Image.Image, ...] = ()
    ratios: tuple[Any, Any] | None = None
    max_tokens: int = 6
    params: dict[str, Any] = field(default_factory=dict)
    votes: str | None = None


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, checkpoint: Path, himap: dict[str, Any] | None, options: dict[str, Any]):
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": 64 << 20,
            "limit_mm_per_prompt": {"image": 4},
            "mm_processor_cache_gb": 0,
            "seed": 0,
        }
        additional_config = {} if himap is None else {"himap": himap}
        gc.freeze()
        self.llm = LLM(
            str(checkpoint), additional_config=additional_config, **{**defaults, **options}
        )

    @property
    def scheduler(self) -> Any:
        """The engine core's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def stats(self) -> dict[str, Any]:
        """The plugin's counters."""
        stats: dict[str, Any] = self.llm.collective_rpc("himap_stats")[0]
        return stats

    def trace(self, request_id: str) -> dict[str, list[list[int]]]:
        """Surviving positions of one pruned prompt."""
        trace: dict[str, list[list[int]]] | None = self.llm.collective_rpc(
            "himap_trace", args=(request_id,)
        )[0]
        assert trace is not None
        return trace

    def prompt(self, case: Case) -> dict[str, Any]:
        """vLLM's prompt for a case."""
        prompt: dict[str, Any] = {"prompt": case.prompt}
        if case.images:
            prompt["multi_modal_data"] = {"image": list(case.images)}
        return prompt

    def params(self, case: Case) -> Any:
        """vLLM's sampling parameters for a case: greedy, with log-probabilities, computed cold.

        `WARM` reads the prefix cache.
        """
        from vllm import SamplingParams

        args = {}
        if case.ratios is not None:
            args = dict(zip(("himap_shallow_ratio", "himap_deep_ratio"), case.ratios, strict=True))
        if case.votes is not None:
            args["himap_votes"] = case.votes
        settings: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": case.max_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": args,
            "skip_reading_prefix_cache": True,
            **case.params,
        }
        return SamplingParams(**settings)

    def generate(self, cases: Sequence[Case]) -> list[Any]:
        """Run all cases as one batch."""
        outputs: list[Any] = self.llm.generate(
            [self.prompt(case) for case in cases],
            [self.params(case) for case in cases],
            use_tqdm=False,
        )
        return outputs


@contextmanager
def watched(engine: Engine, look: Any) -> Iterator[None]:
    """Call `look(scheduler_output)` after every scheduled step."""
    scheduler = engine.scheduler
    schedule = scheduler.schedule

    def watching(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        look(output)
        return output

    scheduler.schedule = watching
    try:
        yield
    finally:
        del scheduler.schedule


@contextmanager
def chunks_of(engine: Engine) -> Iterator[dict[str, list[int]]]:
    """By request id, the numbers of tokens in its steps of more than one token."""
    chunks: dict[str, list[int]] = {}

    def look(output: Any) -> None:
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            if num_tokens > 1:
                chunks.setdefault(request_id.rpartition("-")[0], []).append(num_tokens)

    with watched(engine, look):
        yield chunks
