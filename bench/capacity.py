# SPDX-License-Identifier: Apache-2.0
"""KV blocks per request, and how many requests fit a fixed KV budget, from a running engine.

`measure` runs the engine in a `Worker`, there in-process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so
that its scheduler can be looked at between steps.

* `vllm.v1.core.sched.scheduler.Scheduler.running`,
  `vllm.v1.core.sched.scheduler.Scheduler.waiting`,
  `vllm.v1.core.block_pool.BlockPool.get_num_free_blocks` (read): blocks and requests between two
  steps. Remove when: vLLM reports blocks per request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any

from bench.model import THIN, Cuts
from bench.tables import table
from bench.worker import Worker
from himap_vllm.config import DEEP_ARG, SHALLOW_ARG
from himap_vllm.plan.prompt import NUM_STAGES

BLOCK_SIZE = 32  # tokens; the smallest that vLLM's CPU attention takes (its default is 128)
OUTPUT_TOKENS = 16
KV_BYTES = 160 << 20
POOL_WANTED = 0.98  # of the budget


@dataclass(frozen=True)
class Setting:
    """What is filled, and with what.

    Attributes:
        image_tokens: of an image.
        num_layers: of the decoder.
        token_bytes: key and value of one token in one layer.
        kv_bytes: the budget.
        block_size: tokens per block.
        batched_tokens: per step. All requests that fit must be prefilled before the first one
            has its `output_tokens`.
        output_tokens: of each request; at most `block_size`.
        engine: further arguments of `LLM`.
    """

    image_tokens: int = THIN.image_tokens
    num_layers: int = THIN.num_layers
    token_bytes: int = THIN.kv_bytes("float32")
    kv_bytes: int = KV_BYTES
    block_size: int = BLOCK_SIZE
    batched_tokens: int = 4096
    output_tokens: int = OUTPUT_TOKENS
    engine: dict[str, Any] = field(default_factory=lambda: {"dtype": "float32"})


@dataclass(frozen=True)
class Capacity:
    """One engine's answer, beside the arithmetic one.

    Attributes:
        tokens: [NUM_STAGES] tokens of one request in each stage, with its whole answer.
        groups: [groups] stage of each KV cache group.
        page: tokens times layers whose keys and values one block holds.
        bytes_per_block: of the engine's one block pool.
        num_blocks: blocks that requests can use; vLLM keeps one more for itself.
        budget: bytes that the pool was to have.
        blocks: blocks per running request, at the peak.
        blocks_expected: the same by arithmetic.
        kv_bytes_expected: KV cache of one request from tokens, layers and bytes alone, rounded up
            to whole blocks of tokens in each layer.
        peak: the most requests that ran at once, all with their whole prompt in the cache.
        peak_expected: the same by arithmetic.
        preemptions: how often a request was put back because blocks ran out.
        stats: the plugin's counters; None without the plugin.
    """

    tokens: tuple[int, ...]
    groups: tuple[int, ...]
    page: int
    bytes_per_block: int
    num_blocks: int
    budget: int
    blocks: float
    blocks_expected: int
    kv_bytes_expected: int
    peak: int
    peak_expected: int
    preemptions: int
    stats: dict[str, Any] | None

    @property
    def kv_bytes(self) -> float:
        """KV cache of one request."""
        return self.blocks * self.bytes_per_block

    @property
    def pool_share(self) -> float:
        """How much of the budget has become blocks."""
        return (self.num_blocks + 1) * self.bytes_per_block / self.budget

    @property
    def memory_agrees(self) -> bool:
        """Whether blocks hold what they should, and the pool is what it should be.

        The block counts alone would not tell: what fits a pool follows from the pool's own size.
        """
        return self.kv_bytes == self.kv_bytes_expected and POOL_WANTED <= self.pool_share <= 1

    @property
    def agrees(self) -> bool:
        """Whether the engine holds exactly what the arithmetic says."""
        exact = (self.blocks, self.peak) == (self.blocks_expected, self.peak_expected)
        return exact and self.memory_agrees


def capacity_table(title: str, rows: Iterable[tuple[str, Capacity]], digits: int) -> str:
    """Capacities by name, each number beside the arithmetic one."""
    header = [
        title,
        "tokens per stage",
        "groups x tokens x layers",
        "blocks per request (arithmetic)",
    ]
    header += ["KV of a request, MiB (arithmetic)", "blocks, of the budget"]
    return table(
        [*header, "requests that fit (arithmetic)", "preemptions"],
        [
            [
                name,
                " / ".join(map(str, found.tokens)),
                f"{len(found.groups)} x {found.page}",
                f"{found.blocks:g} ({found.blocks_expected})",
                f"{found.kv_bytes / 2**20:.{digits}f} "
                f"({found.kv_bytes_expected / 2**20:.{digits}f})",
                f"{found.pool_share:.1%}",
                f"{found.peak} ({found.peak_expected})",
                found.preemptions,
            ]
            for name, found in rows
        ],
    )


def measure(
    checkpoint: Path,
    cuts: Cuts,
    pruning: bool,
    log: Path,
    setting: Setting | None = None,
    timeout: float = 3600.0,
) -> Capacity:
    """Fill the KV budget of an engine.

    Args:
        checkpoint: of `THIN`, or what `setting` describes.
        cuts: what pruning does; stock vLLM gets the same prompts, whose length depends on it.
        pruning: False: stock vLLM, without the plugin.
        log: where the engine's output goes.
        setting: by default for `THIN`.
        timeout: in seconds.

    Raises:
        WorkerError: the engine failed, or took too long and was killed.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "himap" if pruning else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    worker = Worker(
        Filling, checkpoint, cuts, pruning, setting or Setting(), log=log, environment=environment
    )
    try:
        capacity: Capacity = worker.call(timeout, "fill")
    finally:
        worker.stop()
    return capacity


def _text_tokens(
    cuts: Cuts, setting: Setting, block_sizes: Sequence[int], minimum: int = 30
) -> int:
    """The shortest text with which a request needs no further block while it answers.

    Then "fits" has one meaning: what is admitted also runs to its end.
    """
    for text in range(minimum, minimum + lcm(*block_sizes)):
        before = cuts.stage_tokens(setting.image_tokens + text, setting.image_tokens)
        if all(
            (int(t) - 1) % block + setting.output_tokens <= block
            for t, block in zip(before, block_sizes, strict=True)
        ):
            return text
    raise ValueError("the stages' last blocks have no common room; use --no-capacity")


class Filling:
    """An engine and the requests that fill its KV cache; lives in a `Worker`."""

    def __init__(self, checkpoint: Path, cuts: Cuts, pruning: bool, setting: Setting) -> None:
        from vllm import LLM

        self._cuts, self._pruning, self._setting = cuts, pruning, setting
        self._llm: Any = LLM(
            str(checkpoint),
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=256,
            max_num_batched_tokens=setting.batched_tokens,
            block_size=setting.block_size,
            kv_cache_memory_bytes=setting.kv_bytes,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=False,  # requests are alike, and shared blocks would count once
            additional_config={"himap": cuts.engine_settings()} if pruning else {},
            **setting.engine,
        )
        self._scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler

    def close(self) -> None:
        """Nothing to end: the engine ends with the process."""

    def fill(self) -> Capacity:
        """Run as many requests at once as the KV cache holds."""
        from himap_vllm.core.stage_groups import StageGroups

        setting, cuts = self._setting, self._cuts
        kv_cache = self._scheduler.kv_cache_config
        layers = cuts.stage_layers(setting.num_layers)
        groups, sizes = [0], [setting.block_size] * NUM_STAGES
        if self._pruning:
            made = StageGroups.of(kv_cache, layers)
            groups, sizes = made.stages, made.block_sizes
        page = max(
            len(group.layer_names) * group.kv_cache_spec.block_size
            for group in kv_cache.kv_cache_groups
        )
        self._text = _text_tokens(cuts, setting, sizes)
        # The last token of an answer is never computed.
        whole = setting.image_tokens + self._text + setting.output_tokens - 1
        left = cuts.stage_tokens(whole, setting.image_tokens)
        tokens = tuple(map(int, left)) if self._pruning else (whole,) * NUM_STAGES
        # A group with fewer layers than a block has room for takes whole blocks all the same.
        room = [page // size if self._pruning else 1 for size in sizes]
        token_layers = sum(
            -(-t // size) * size * -(-n // fit) * fit
            for t, n, size, fit in zip(tokens, layers, sizes, room, strict=True)
        )
        expected = sum(-(-tokens[stage] // sizes[stage]) for stage in groups)
        num_blocks = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self._add_requests(num_blocks // expected + 4)
        peak, blocks, preemptions = self._run(num_blocks)
        return Capacity(
            tokens=tokens,
            groups=tuple(groups),
            page=page,
            bytes_per_block=kv_cache.kv_cache_tensors[0].size // kv_cache.num_blocks,
            num_blocks=num_blocks,
            budget=setting.kv_bytes,
            blocks=blocks,
            blocks_expected=expected,
            kv_bytes_expected=setting.token_bytes * token_layers,
            peak=peak,
            peak_expected=num_blocks // expected,
            preemptions=preemptions,
            stats=self._llm.collective_rpc("himap_stats")[0] if self._pruning else None,
        )

    def _add_requests(self, number: int) -> None:
        from PIL import Image
        from vllm import SamplingParams

        ratios = {SHALLOW_ARG: self._cuts.ratios.shallow, DEEP_ARG: self._cuts.ratios.deep}
        params = SamplingParams(
            temperature=0,
            max_tokens=self._setting.output_tokens,
            ignore_eos=True,
            extra_args=ratios if self._pruning else None,
        )
        image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
        # The tokenizer has a token per character, and puts <s> in front.
        prompt = {
            "prompt": "<image>" + "x" * (self._text - 1),
            "multi_modal_data": {"image": image},
        }
        for index in range(number):
            self._llm.llm_engine.add_request(str(index), prompt, params)

    def _run(self, num_blocks: int) -> tuple[int, float, int]:
        """The most requests at once, blocks of each at that time, and preemptions."""
        engine, scheduler = self._llm.llm_engine, self._scheduler
        prompt = self._setting.image_tokens + self._text
        pool = scheduler.kv_cache_manager.block_pool
        peak, blocks = 0, 0.0
        preempted: dict[str, int] = {}
        while engine.has_unfinished_requests():
            engine.step()
            running = scheduler.running
            # A prompt that waits for room in a step may already run, with its leading text.
            if len(running) > peak and all(request.num_output_tokens for request in running):
                assert {request.num_prompt_tokens for request in running} == {prompt}
                peak = len(running)
                blocks = (num_blocks - pool.get_num_free_blocks()) / peak
            for request in (*running, *scheduler.waiting):
                preempted[request.request_id] = request.num_preemptions
        return peak, blocks, sum(preempted.values())
