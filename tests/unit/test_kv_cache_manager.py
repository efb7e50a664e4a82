# SPDX-License-Identifier: Apache-2.0
"""The KV cache manager's shortcut for decoding requests, against vLLM's own way, step by step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import lcm
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from himap_vllm.core.kv_cache_manager import PruningKVCacheManager, make_pruning_manager
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios
from himap_vllm.plan.waiting import PassedOver

STAGES = (0, 1, 1, 2, 2, 2)  # of the KV cache groups
UNIT = 4  # tokens that hashes are made of
SIZES = {"many": (4, 4, 4), "balanced": (12, 4, 8)}  # tokens to a block, by stage
NO_ROOM = "no room"


class OrderedKVCacheManager(PruningKVCacheManager):
    """Without the shortcut: vLLM's, but for pruned prefixes and the order of returned blocks."""

    plans: dict[str, PromptPlan]

    def _note_horizon(self, request: Request, end: int) -> None:
        """Nothing: no request takes the shortcut."""

    def free(self, request: Request) -> None:
        if self.enable_caching:
            self.himap_prefixes.publish_rest(request)
        blocks = []
        plan = self.plans.get(request.request_id)
        for group, stage in zip(self.coordinator.single_type_managers, STAGES, strict=True):
            for i, block in enumerate(group.pop_blocks_for_free(request.request_id)):
                place = i * group.block_size
                if plan is not None and place > plan.first_image_token:
                    place += plan.removed[stage]
                blocks.append((place, group.kv_cache_group_id, block))
        blocks.sort(key=lambda entry: entry[:2])
        self.block_pool.free_blocks(block for _, _, block in reversed(blocks))


class Side:
    """One of the two managers, with requests of its own."""

    def __init__(
        self, sizes: Sequence[int], num_blocks: int, caching: bool, shortcut: bool
    ) -> None:
        specs = [
            StageAttentionSpec(
                block_size=sizes[stage],
                num_kv_heads=1,
                head_size=32,
                dtype=torch.float32,
                stage=stage,
            )
            for stage in STAGES
        ]
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
        self.manager: Any = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=256,
            scheduler_block_size=lcm(*sizes),
            hash_block_size=UNIT,
            enable_caching=caching,
        )
        self.plans: dict[str, PromptPlan] = {}
        self.requests: dict[str, Request] = {}
        make_pruning_manager(self.manager, STAGES, self.plans, PassedOver())
        if not shortcut:
            ordered: Any = self.manager
            ordered.__class__ = OrderedKVCacheManager
            ordered.plans = self.plans

    def add(self, name: str, tokens: list[int], plan: PromptPlan | None) -> None:
        """A request, known to the scheduler."""
        params = SamplingParams(max_tokens=200)
        params.update_from_generation_config({}, 0)
        hasher = get_request_block_hasher(UNIT, sha256)
        request = Request(name, list(tokens), params, None, block_hasher=hasher)
        if plan is not None:
            self.plans[name] = plan
        self.requests[name] = request

    def admit(self, name: str) -> Any:
        """Compute all that the prefix cache has not, of a new request or a preempted one."""
        request = self.requests[name]
        self.manager.new_step_starts()
        computed, num_computed, *_ = self.manager.get_computed_blocks(request)
        num_new = request.num_tokens - num_computed
        blocks = self.manager.allocate_slots(
            request, num_new, num_computed, computed, full_sequence_must_fit=True
        )
        if blocks is None:
            return NO_ROOM
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_computed + num_new
        return num_computed, blocks.get_block_ids()

    def decode(self, name: str, tokens: list[int], publish: bool) -> Any:
        """Append tokens and compute them, as the scheduler does."""
        request = self.requests[name]
        request.append_output_token_ids(tokens)
        if publish:  # as async scheduling does, for each request and step
            self.manager.cache_blocks(request, request.num_computed_tokens)
        blocks = self.manager.allocate_slots(request, len(tokens), num_lookahead_tokens=0)
        if blocks is None:
            return NO_ROOM
        request.num_computed_tokens += len(tokens)
        return blocks.get_block_ids(allow_none=True)

    def free(self, name: str, preempt: bool) -> None:
        """Preempt a request, or end it."""
        request = self.requests[name]
        self.manager.free(request)
        if preempt:
            request.status = RequestStatus.PREEMPTED
            request.num_computed_tokens = 0
        else:
            self.plans.pop(name, None)
            self.manager.himap_prefixes.forget(name)
            del self.requests[name]

    def state(self) -> Any:
        """Whose the blocks are, what is published, what is free."""
        coordinator, pool = self.manager.coordinator, self.manager.block_pool
        held = {
            name: [[block.block_id for block in group] for group in coordinator.get_blocks(name)]
            for name in self.requests
        }
        return held, [block.block_hash for block in pool.blocks], pool.get_num_free_blocks()


def make_prompt(rng: random.Random) -> tuple[list[int], PromptPlan | None]:
    """Few tokens, so that prefixes are shared; half the longer ones with a pruned image."""
    tokens = [rng.randrange(2) for _ in range(rng.randrange(3, 40))]
    if len(tokens) < 12 or rng.random() < 0.5:
        return tokens, None
    start = rng.randrange(0, len(tokens) - 8)
    images = (ImageTokens(((start, start + rng.randrange(4, 8)),)),)
    return tokens, PromptPlan(len(tokens), images, (Ratios(rng.choice([0, 0.5]), 0.75),))


@pytest.mark.parametrize("num_blocks", [80, 150, 600])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("publish", [True, False])
@pytest.mark.parametrize("kv_grouping", SIZES)
def test_equals_vllms(num_blocks: int, caching: bool, publish: bool, kv_grouping: str) -> None:
    init_none_hash(sha256)
    sizes = SIZES[kv_grouping]
    for seed in range(6):
        rng = random.Random(f"{num_blocks} {caching} {publish} {seed}")
        sides = [Side(sizes, num_blocks, caching, shortcut) for shortcut in (False, True)]

        def both(method: str, *arguments: Any, sides: list[Side] = sides) -> Any:
            answers = [getattr(side, method)(*arguments) for side in sides]
            assert answers[0] == answers[1]
            return answers[0]

        running: list[str] = []
        waiting: list[str] = []
        for step in range(120):
            for name in list(running):
                new = [rng.randrange(2) for _ in range(rng.choice([1, 1, 1, 6]))]
                if len(sides[0].requests[name].all_token_ids) > 200 or rng.random() < 0.02:
                    both("free", name, False)
                    running.remove(name)
                elif both("decode", name, new, publish) is NO_ROOM:
                    both("free", name, True)
                    running.remove(name)
                    waiting.insert(0, name)
            if rng.random() < 0.3:
                waiting.append(f"request {step}")
                both("add", waiting[-1], *make_prompt(rng))
            if running and rng.random() < 0.1:
                waiting.insert(0, running.pop(rng.randrange(len(running))))
                both("free", waiting[0], True)
            while waiting and both("admit", waiting[0]) is not NO_ROOM:
                running.append(waiting.pop(0))
            if step % 4 == 0:  # what differs stays different
                both("state")
        both("state")
        shortcut: Any = sides[1].manager
        assert set(shortcut.himap_horizons) <= set(running)
