# SPDX-License-Identifier: Apache-2.0
"""Which part of a pruned prompt the prefix cache has, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from himap_vllm.core.kv_cache_manager import make_pruning_manager
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.cuts import KVGrouping
from himap_vllm.plan.grouping import choose_grouping
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios
from himap_vllm.plan.waiting import PassedOver

SIZE = 16
IMAGE = (70, 134)  # 64 tokens
PROMPT = list(range(150))
RATIOS = Ratios(0.5, 0.75)


class Cache:
    """A manager, and requests one after the other."""

    def __init__(self, kv_grouping: KVGrouping = "many", num_blocks: int = 2000) -> None:
        grouping = choose_grouping(kv_grouping, (2, 6, 24), SIZE, SIZE)
        stages = [stage for stage, parts in enumerate(grouping.parts) for _ in range(parts)]
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        groups = [
            KVCacheGroupSpec(
                [f"{i}"],
                StageAttentionSpec(block_size=grouping.block_sizes[stage], stage=stage, **shape),
            )
            for i, stage in enumerate(stages)
        ]
        self.manager: Any = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=2048,
            scheduler_block_size=grouping.alignment,
            hash_block_size=SIZE,
            enable_kv_cache_events=True,
        )
        self.plans: dict[str, PromptPlan] = {}
        self.stages = stages
        self.blocks: list[list[int]] = []  # of each group, of the latest request
        make_pruning_manager(self.manager, stages, self.plans, PassedOver())

    def add(
        self, name: str, tokens: list[int], end: int | None = None, ratios: Ratios = RATIOS,
        salt: str | None = None, reads: bool = True, pruned: bool = True,
    ) -> Request:  # fmt: skip
        """A request whose image's unit ends at `end`; None: at the end of its prompt."""
        params = SamplingParams(max_tokens=100, skip_reading_prefix_cache=not reads)
        params.update_from_generation_config({}, 0)
        hasher = get_request_block_hasher(SIZE, sha256)
        request = Request(name, list(tokens), params, None, block_hasher=hasher, cache_salt=salt)
        ends = (len(tokens) if end is None else end,)
        if pruned:
            self.plans[name] = PromptPlan(len(tokens), (ImageTokens((IMAGE,)),), (ratios,), ends)
        return request

    def run(
        self, tokens: list[int], end: int | None = None, ratios: Ratios = RATIOS,
        salt: str | None = None, answer: int = 0, reads: bool = True,
        pruned: bool = True, preempted: bool = False,
    ) -> tuple[int, Request]:  # fmt: skip
        """Compute a prompt whose image's unit ends at `end`; how many tokens were cached.

        `preempted`: another request takes its blocks in the step that schedules it.
        """
        request = self.add("name", tokens, end, ratios, salt, reads, pruned)
        self.manager.new_step_starts()
        bound = (None,) if pruned and reads else ()  # as vLLM does from 0.33 on
        blocks, found, _ = self.manager.get_computed_blocks(request, *bound)
        assert self.manager.allocate_slots(request, len(tokens) - found, found, blocks) is not None
        self.blocks = [[*ids] for ids in self.manager.get_block_ids("name")]
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = 0 if preempted else len(tokens)
        for token in range(answer):
            request.append_output_token_ids(1000 + token)
            assert self.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        self.manager.block_pool.free_blocks(self.manager.take_kv_cache_block_copies()[1])
        self.manager.free(request)
        self.plans.pop("name", None)
        self.manager.himap_prefixes.forget("name")
        return found, request


@pytest.fixture(scope="module", autouse=True)
def _hashing() -> None:
    init_none_hash(sha256)


@pytest.mark.parametrize("kv_grouping", ["few", "balanced", "many"])
def test_what_is_found(kv_grouping: KVGrouping) -> None:
    cache = Cache(kv_grouping)
    before_image = IMAGE[0] // cache.manager.himap_prefixes._stages[0][0].scheduler_block_size
    before_image *= cache.manager.himap_prefixes._stages[0][0].scheduler_block_size
    assert cache.run(PROMPT, answer=20)[0] == 0
    assert cache.run(PROMPT)[0] == len(PROMPT) - 1
    # The next turn: the answer without its last token was computed, and the question.
    answered = [*PROMPT, *range(1000, 1020)]
    assert cache.run([*answered, 1, 2, 3], end=len(PROMPT))[0] == len(answered)
    assert cache.run([*PROMPT, 7, 8], end=len(PROMPT))[0] == len(PROMPT)
    # Another question votes; other ratios and salts are other prompts.
    assert cache.run([*PROMPT[:-1], 1])[0] == before_image
    assert cache.run(PROMPT, ratios=Ratios(0.5, 0.5))[0] == before_image
    assert cache.run(PROMPT, salt="salt")[0] == 0
    assert cache.run(PROMPT, salt="salt")[0] == len(PROMPT) - 1


@pytest.mark.parametrize("kv_grouping", ["few", "balanced", "many"])
def test_an_image_is_found_where_no_text_votes(kv_grouping: KVGrouping) -> None:
    cache = Cache(kv_grouping)
    cache.run(PROMPT, end=IMAGE[1])
    assert cache.run([*PROMPT[: IMAGE[1]], 1, 2, 3], end=IMAGE[1])[0] == IMAGE[1]
    # A prompt that ends with the image keeps its last row, so it shares nothing with those.
    assert cache.run(PROMPT[: IMAGE[1]], end=IMAGE[1])[0] < IMAGE[0]
    cache = Cache(kv_grouping)
    cache.run(PROMPT[: IMAGE[1]], end=IMAGE[1])
    assert cache.run(PROMPT, end=IMAGE[1])[0] < IMAGE[0]


@pytest.mark.parametrize(("end", "text"), [(len(PROMPT), 0), (IMAGE[1], 0), (len(PROMPT), 8)])
def test_a_prompt_waits_for_one_that_computes_its_image(end: int, text: int) -> None:
    """In the step that schedules the first. `text` comes behind the unit."""
    cache = Cache("balanced")
    waiting = []
    cache.manager.new_step_starts()
    for name in ("first", "second"):
        request = cache.add(name, [*PROMPT, *range(text)], end)
        blocks, found, _ = cache.manager.get_computed_blocks(request)
        new = request.num_tokens - found
        waiting.append(cache.manager.allocate_slots(request, new, found, blocks) is None)
    assert waiting == [False, True]
    cache.manager.new_step_starts()
    blocks, found, _ = cache.manager.get_computed_blocks(request)
    assert found == request.num_tokens - 1
    assert cache.manager.allocate_slots(request, 1, found, blocks) is not None


def test_a_prompt_waits_for_its_copy_behind_a_cached_image() -> None:
    cache = Cache("balanced")
    cache.run(PROMPT)
    waiting = []
    cache.manager.new_step_starts()
    for name in ("first", "second", "other"):
        text = [*PROMPT, *range(500, 600), name == "other"]
        request = cache.add(name, text, len(PROMPT))
        blocks, found, _ = cache.manager.get_computed_blocks(request)
        new = request.num_tokens - found
        waiting.append(cache.manager.allocate_slots(request, new, found, blocks) is None)
    assert waiting == [False, True, False]


@pytest.mark.parametrize("kv_grouping", ["few", "balanced", "many"])
def test_tokens_of_two_choices_do_not_meet(kv_grouping: KVGrouping) -> None:
    """Two requests compute an image, which they may prune differently at a near-tie."""
    cache = Cache(kv_grouping)
    cache.run(PROMPT)
    of_first = cache.blocks
    for stage, blocks in enumerate(of_first):  # some of these are lost
        cache.manager.block_pool.evict_blocks({blocks[-1] if stage % 2 else blocks[0]})
    cache.run(PROMPT, reads=False)
    assert cache.run(PROMPT)[0] == len(PROMPT) - 1
    sizes = cache.manager.himap_block_sizes
    for group, (used, before) in enumerate(zip(cache.blocks, of_first, strict=True)):
        stage = cache.stages[group]
        if stage:  # what holds the image
            first_block = IMAGE[0] // sizes[stage]
            assert not set(used[first_block:]) & set(before), group


@pytest.mark.parametrize("pruned", [False, True])
def test_what_was_scheduled_and_not_computed_is_not_found(pruned: bool) -> None:
    """As with priorities, where a step may preempt what it has scheduled."""
    cache = Cache()
    cache.run(PROMPT, pruned=pruned, preempted=True)
    assert cache.run(PROMPT, pruned=pruned)[0] == 0


def test_a_reset_forgets_all() -> None:
    cache = Cache()
    cache.run(PROMPT)
    assert cache.manager.reset_prefix_cache()
    assert cache.run(PROMPT)[0] == 0


def test_events_tell_of_the_first_stage() -> None:
    """Of what is stored, and of what is removed, with ordinary hashes."""
    cache = Cache(num_blocks=400)
    _, request = cache.run(PROMPT)
    announced = {maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes}
    stored = cache.manager.take_events()
    assert {type(event) for event in stored} == {BlockStored}
    assert {event.group_idx for event in stored} == {0}
    assert {block_hash for event in stored for block_hash in event.block_hashes} == announced
    pool = cache.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))
    removed = cache.manager.take_events()
    assert {type(event) for event in removed} == {BlockRemoved}
    assert announced <= {block_hash for event in removed for block_hash in event.block_hashes}
    assert not cache.run(PROMPT)[0]
