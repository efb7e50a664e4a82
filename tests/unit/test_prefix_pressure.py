# SPDX-License-Identifier: Apache-2.0
"""How much of a prefix survives when other requests take memory: vLLM's manager against ours.

The memory is the same: stock vLLM has one group of all 32 layers, we have several of fewer layers.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from himap_vllm.core.kv_cache_manager import make_pruning_manager
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.cuts import KVGrouping
from himap_vllm.plan.grouping import Grouping, choose_grouping
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios
from himap_vllm.plan.waiting import PassedOver

SIZE = 16  # tokens to a block of stock vLLM
LAYERS = (2, 6, 24)  # 32 layers cut at (2, 8)
CAPACITY = 64  # stock vLLM's blocks
PROMPT = list(range(512))
GROUPINGS = {name: choose_grouping(name, LAYERS, SIZE, SIZE) for name in get_args(KVGrouping)}


class Cache:
    """A manager and its requests, one after the other."""

    def __init__(self, grouping: Grouping | None) -> None:
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        specs: list[FullAttentionSpec] = [FullAttentionSpec(block_size=SIZE, **shape)]
        num_blocks, aligned, stages = CAPACITY, SIZE, []
        if grouping is not None:
            stages = [stage for stage, n in enumerate(grouping.parts) for _ in range(n)]
            specs = [
                StageAttentionSpec(block_size=grouping.block_sizes[stage], stage=stage, **shape)
                for stage in stages
            ]
            num_blocks = CAPACITY * SIZE * sum(LAYERS) // grouping.page
            aligned = grouping.alignment
        self.manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=1 + num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec([f"{i}"], spec) for i, spec in enumerate(specs)],
            ),
            max_model_len=2048,
            scheduler_block_size=aligned,
            hash_block_size=SIZE,
        )
        self.plans: dict[str, PromptPlan] = {}
        self.pruning = grouping is not None
        self.aligned = aligned
        if self.pruning:
            make_pruning_manager(self.manager, stages, self.plans, PassedOver())

    def _request(self, name: str, tokens: list[int], plan: PromptPlan | None) -> Request:
        params = SamplingParams(max_tokens=1)
        params.update_from_generation_config({}, 0)
        hasher = get_request_block_hasher(SIZE, sha256)
        request = Request(name, tokens, params, None, block_hasher=hasher)
        if plan is not None and self.pruning:
            self.plans[name] = plan
        return request

    def cached_tokens(self, tokens: list[int], plan: PromptPlan | None = None) -> int:
        """Tokens of a prompt that the prefix cache has."""
        self.manager.new_step_starts()
        found = self.manager.get_computed_blocks(self._request("look", tokens, plan))[1]
        self._end("look")
        return found

    def run(
        self, name: str, tokens: list[int], plan: PromptPlan | None = None, deferred: bool = False
    ) -> None:
        """Compute a prompt whole, in a step of its own, and end the request."""
        self.manager.new_step_starts()
        request = self._request(name, tokens, plan)
        blocks, num_computed, *_ = self.manager.get_computed_blocks(request)
        num_new = len(tokens) - num_computed
        assert self.manager.allocate_slots(request, num_new, num_computed, blocks) is not None
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = len(tokens)
        if deferred:  # as the scheduler does while the worker may still write to the blocks
            held = self.manager.pop_blocks_for_free(request)
            self.manager.block_pool.free_blocks(reversed(held))
        else:
            self.manager.free(request)
        self._end(name)

    def _end(self, name: str) -> None:
        if self.plans.pop(name, None) is not None:
            manager: Any = self.manager
            manager.himap_prefixes.forget(name)


def others(name: int, num_tokens: int) -> list[int]:
    """A prompt that shares nothing with any other."""
    return [10_000 * (name + 1)] * num_tokens


@pytest.fixture(scope="module", autouse=True)
def _hashing() -> None:
    init_none_hash(sha256)


@pytest.fixture(params=GROUPINGS)
def caches(request: pytest.FixtureRequest) -> tuple[Cache, Cache]:
    """Stock vLLM's and ours, empty."""
    return Cache(None), Cache(GROUPINGS[request.param])


def least(stock: int, cache: Cache) -> int:
    """What ours must have of a prefix of which stock vLLM has `stock` tokens.

    Two blocks less, or two blocks of what its hits are made of.
    """
    return stock - 2 * cache.aligned


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("taken", [2, 6, 12, 20, 28], ids=lambda n: f"{n}_of_32_blocks")
def test_a_prefix_is_evicted_from_its_end(
    caches: tuple[Cache, Cache], taken: int, deferred: bool
) -> None:
    for cache in caches:
        cache.run("prefix", PROMPT, deferred=deferred)
        cache.run("other", others(0, (CAPACITY - len(PROMPT) // SIZE + taken) * SIZE))
    stock, ours = (cache.cached_tokens([*PROMPT, 1]) for cache in caches)
    assert stock == len(PROMPT) - taken * SIZE
    assert ours >= least(stock, caches[1])


@pytest.mark.parametrize("taken", [2, 6, 12, 20, 28])
def test_text_before_a_pruned_image_is_evicted_from_its_end(
    caches: tuple[Cache, Cache], taken: int
) -> None:
    """The blocks behind the first image, of which each stage has another number, go first."""
    image = ImageTokens(((300, 480),))
    plan = PromptPlan(len(PROMPT), (image,), (Ratios(0.5, 0.75),))
    for cache in caches:
        cache.run("prefix", PROMPT, plan)
        cache.run("other", others(0, (CAPACITY - len(PROMPT) // SIZE + taken) * SIZE))
    stock, ours = (cache.cached_tokens(PROMPT, plan) for cache in caches)
    assert ours <= len(PROMPT) - 1
    assert ours >= least(min(stock, image.first), caches[1])


@pytest.mark.parametrize("taken", [2, 6, 12, 20, 28])
def test_the_oldest_prefix_goes_first(caches: tuple[Cache, Cache], taken: int) -> None:
    """Several prefixes, one of them used again, and small requests that take memory bit by bit."""
    prefixes = [others(i, 15 * SIZE) for i in range(4)]
    for cache in caches:
        for i, prefix in enumerate(prefixes):
            cache.run(f"prefix {i}", prefix)
        cache.run("again", [*prefixes[0], 7])
        for i in range(taken):
            cache.run(f"other {i}", others(10 + i, SIZE))
    found = [[cache.cached_tokens([*prefix, 1]) for prefix in prefixes] for cache in caches]
    for stock, ours in zip(*found, strict=True):
        assert ours >= least(stock, caches[1])
