# SPDX-License-Identifier: Apache-2.0
"""Random conversations on a scheduler: every entry that a request reads is that of a cold run.

Set `HIMAP_SHADOW_SCHEDULES` to run more than CI does.
"""

from __future__ import annotations

import copy
import os
import random
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from himap_vllm.core.scheduler import PruningAsyncScheduler, PruningScheduler
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.prompt import Ratios
from tests.checkpoints import build_llava
from tests.shadow_cache import MARKER, UNIT, Prompt, Shadow, ShadowWorker

STAGES = (0, 1, 1, 1, 2, 2)  # of the KV cache groups, of two layers each
SIZES = {"many": (4, 4, 4), "balanced": (12, 4, 4), "few": (8, 12, 4)}
MODES = ("plain", "async", "priority", "drafts")
NUM_SCHEDULES = int(os.environ.get("HIMAP_SHADOW_SCHEDULES", "120"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    init_none_hash(sha256)
    path: Path = tmp_path_factory.mktemp("checkpoints") / "llava"
    build_llava(path, image_size=84, patch_size=14, num_layers=12, num_heads=4, num_kv_heads=4)
    return EngineArgs(
        model=str(path),
        additional_config={"himap": {"shallow_layer": 2, "deep_layer": 8}},
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        dtype="float32",
    ).create_engine_config()


def make_worker(config: Any, mode: str, sizes: tuple[int, ...], num_blocks: int) -> ShadowWorker:
    """A scheduler with a worker."""
    config.cache_config.num_gpu_blocks = num_blocks
    config.scheduler_config.policy = "priority" if mode == "priority" else "fcfs"
    shape: dict[str, Any] = {"num_kv_heads": 4, "head_size": 16, "dtype": torch.float32}
    groups, layers = [], 0
    for stage in STAGES:
        spec = StageAttentionSpec(block_size=sizes[stage], stage=stage, **shape)
        names = [f"model.layers.{layers + i}.attn" for i in range(2)]
        groups.append(KVCacheGroupSpec(names, spec))
        layers += 2
    scheduler = (PruningAsyncScheduler if mode == "async" else PruningScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=lcm(*sizes),
        hash_block_size=UNIT,
    )
    if mode == "drafts":
        scheduler.num_spec_tokens = 3
    return ShadowWorker(scheduler, STAGES, sizes, num_blocks, int(mode == "async"))


class Traffic:
    """Conversations that branch, prompts that are sent again, and several answers to one."""

    def __init__(self, rng: random.Random, worker: ShadowWorker) -> None:
        self._rng, self._worker = rng, worker
        self._prompts = [Prompt()]  # those sent, and those with their answers
        self._votes = rng.choice(["turn", "turn", "none", "all"])
        self._system = Prompt()
        self._system.add_text(random.Random(1), 9, 9)

    def send(self) -> None:
        """A request or several."""
        rng, worker = self._rng, self._worker
        prompt = rng.choice(self._prompts[-6:]).copy()
        if not prompt.tokens:
            prompt = self._system.copy()
        if rng.random() < 0.7 and len(prompt.tokens) < 150:
            prompt.add_text(rng, 0, 3)
            for _ in range(rng.choice([0, 0, 1, 1, 2])):
                prompt.add_image(rng)
                prompt.add_text(rng, 0, 2)
            prompt.add_text(rng, 0, 8)
            if rng.random() < 0.8:
                prompt.tokens.append(MARKER)
        if not prompt.tokens or max(self._units(prompt), default=0) > 128:
            return
        self._prompts.append(prompt)
        ratios = rng.choice([None, *[Ratios(0.5, 0.75)] * 4, Ratios(0.5, 0.5), Ratios(0, 0.75)])
        salt = rng.choice([None, None, None, "salt"])
        for _ in range(rng.choice([1, 1, 1, 3])):
            shadow = Shadow(f"request {len(worker.shadows)}", prompt, salt, ratios, self._votes)
            worker.add(shadow, rng.randrange(3), rng.choice([1, 3, 30]))

    def _units(self, prompt: Prompt) -> list[int]:
        return [
            end - start
            for (start, _, _), end in zip(prompt.images, prompt.ends(self._votes), strict=True)
        ]

    def answered(self, shadow: Shadow, num_tokens: int) -> None:
        """A request has ended after some tokens of the sequence."""
        prompt = shadow.prompt.copy()
        prompt.tokens += [shadow.token(i) for i in range(len(prompt.tokens), num_tokens)]
        self._prompts.append(prompt)

    def reset(self) -> None:
        """Begin with the prompts anew."""
        self._prompts = [Prompt()]


def run_schedule(config: Any, mode: str, sizes: tuple[int, ...], seed: int) -> tuple[int, int]:
    """One schedule; tokens that were found in the cache, and tokens of all prompts."""
    rng = random.Random(f"{mode} {sizes} {seed}")
    num_blocks = rng.choice([190, 260, 500])
    worker = make_worker(config, mode, sizes, num_blocks)
    scheduler: Any = worker.scheduler
    traffic = Traffic(rng, worker)
    for _ in range(rng.choice([15, 60])):
        if rng.random() < 0.4 and len(scheduler.requests) < 12:
            traffic.send()
        before = dict(scheduler.requests)
        worker.step()
        if scheduler.requests and rng.random() < 0.08:
            name = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if not scheduler.requests and rng.random() < 0.2:
            worker.drain()
            assert scheduler.reset_prefix_cache()
        for name, request in before.items():
            if name not in scheduler.requests:
                traffic.answered(worker.shadows[name], request.num_tokens)
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    worker.step()
    worker.drain()
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == num_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    assert not scheduler.himap_plans
    assert not scheduler.himap_prefixes._hashes
    return worker.num_found, worker.num_asked


def test_nobody_waits_for_the_text_of_a_prompt_that_it_shares(config: Any) -> None:
    """A prompt of many steps publishes in each of them a block that the other has to copy."""
    config = copy.deepcopy(config)
    config.scheduler_config.long_prefill_token_threshold = 40
    worker = make_worker(config, "plain", SIZES["many"], 2000)
    rng = random.Random(0)
    prompt = Prompt()
    prompt.add_text(rng, 9, 9)
    prompt.add_image(rng)
    prompt.tokens.append(MARKER)
    prompt.add_text(rng, 500, 500)
    ratios = Ratios(0.5, 0.75)
    worker.add(Shadow("first", prompt, None, ratios, "turn"), 0, 1)
    worker.step()
    worker.step()
    worker.add(Shadow("second", prompt, None, ratios, "turn"), 0, 1)
    worker.step()
    second = worker.scheduler.requests["second"]
    assert second.num_computed_tokens > 60


@pytest.mark.parametrize("kv_grouping", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_reads_are_those_of_a_cold_run(config: Any, mode: str, kv_grouping: str) -> None:
    found = [
        run_schedule(config, mode, SIZES[kv_grouping], seed)
        for seed in range(NUM_SCHEDULES // len(MODES) // len(SIZES))
    ]
    num_found, num_asked = (sum(column) for column in zip(*found, strict=True))
    assert num_found > num_asked / 8
