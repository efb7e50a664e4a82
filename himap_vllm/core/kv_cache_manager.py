# SPDX-License-Identifier: Apache-2.0
"""The KV cache manager of an engine whose layers are in many KV cache groups.

It differs from vLLM's manager in two ways.

*It takes less time.* vLLM's manager asks each group, four times per request and step (five with
async scheduling), whether there is anything to do. Three stages of 2, 6 and 24 layers make 16
groups, and for a batch of 64 decoding requests that alone took four milliseconds of a step. But the
groups of a stage always hold equally many blocks, and most steps of a request need no new block.
This manager computes how far a request's blocks reach when it allocates them. A step then only
compares.

*Prefixes are evicted from their end.* A prefix is cached as far as all groups have it. vLLM's
manager returns a request's blocks group by group, so that all blocks of the first group are reused
first, and the whole prefix is lost with little memory taken. This manager returns them in the order
of their places in the sequence, all groups together.

Seams, all on the scheduler's one instance:

* `vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots`,
  `vllm.v1.core.kv_cache_manager.KVCacheManager.cache_blocks` (overridden): one comparison answers
  for all groups of a request that decodes. Remove when: vLLM asks one group of those that are
  alike.
* `vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots` (overridden): None, no blocks, ends
  the admission of a step behind a prompt that others have passed long enough. Remove when: a
  request can declare a range of its prompt that is computed in one step.
* `vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks`,
  `vllm.v1.core.kv_cache_manager.KVCacheManager.new_step_starts`,
  `vllm.v1.core.kv_cache_manager.KVCacheManager.reset_prefix_cache` (overridden): pruned requests
  have a prefix cache of their own (`StagePrefixCache`). Remove when: a block's tokens may be any
  positions of a sequence.
* `vllm.v1.core.kv_cache_manager.KVCacheManager.free`,
  `vllm.v1.core.kv_cache_manager.KVCacheManager.pop_blocks_for_free` (overridden): blocks of all
  groups in the order of their places. Remove when: `KVCacheCoordinator.free` returns the blocks of
  all groups from the sequence's end to its beginning.
* `vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.pop_blocks_for_free` (called):
  one group's blocks. Remove when: `pop_blocks_for_free` is no longer overridden.
* `vllm.v1.core.kv_cache_manager.KVCacheManager.empty_kv_cache_blocks` (read): replaced by an object
  that knows that it is empty. Remove when: `KVCacheBlocks.get_block_ids` does not look at each
  group of an empty answer.
* `vllm.v1.core.block_pool.BlockPool.get_new_blocks` (called): blocks for all groups at once. Remove
  when: `allocate_slots` is no longer overridden.
* `vllm.v1.core.block_pool.BlockPool.free_blocks` (called): likewise. Remove when: `free` is no
  longer overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter, mul
from typing import Any

from typing_extensions import override
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from himap_vllm.core.prefix_cache import StagePrefixCache
from himap_vllm.core.stage_hashes import HashFunction
from himap_vllm.core.stage_kv_cache_manager import StageKVCacheManager
from himap_vllm.plan.prompt import PromptPlan
from himap_vllm.plan.waiting import PassedOver


@dataclass(slots=True)
class BlockHorizon:
    """Numbers of tokens up to which a request past its prompt needs nothing from the manager.

    Attributes:
        slots: [stages] tokens of the sequence that have slots in the stage.
        fewest_slots: the least of these.
        next_cacheable: from this many computed tokens on, it has a block for the prefix cache.
    """

    slots: list[int]
    fewest_slots: int
    next_cacheable: float


class NoBlocks(KVCacheBlocks):
    """The answer to a request that needs none, without a look at every group."""

    @override
    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        """As `KVCacheBlocks.get_block_ids`."""
        return None if allow_none else super().get_block_ids(**kwargs)


class PruningKVCacheManager(KVCacheManager):
    """vLLM's manager with a shortcut for requests that decode, and another order of eviction."""

    himap_plans: Mapping[str, PromptPlan]
    himap_stages: Sequence[Sequence[StageKVCacheManager]]
    himap_block_sizes: Sequence[int]  # of each stage
    himap_horizons: dict[str, BlockHorizon]
    himap_passed: PassedOver
    himap_prefixes: StagePrefixCache

    @override
    def get_computed_blocks(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        """As `KVCacheManager.get_computed_blocks`.

        From 0.33 on, the caller may give an upper bound: for routed experts only, so never here.
        """
        if request.request_id not in self.himap_plans or not self.prefix_cache_lookup_enabled(
            request
        ):
            return super().get_computed_blocks(request, *args, **kwargs)
        blocks, num_tokens = self.himap_prefixes.find(request)
        return self.create_kv_cache_blocks(blocks), num_tokens, 0

    @override
    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As `KVCacheManager.allocate_slots`, whose answer is the same.

        But a request that waits gets none in a step that admits nothing more.
        """
        end = request.num_computed_tokens + num_new_tokens
        horizon = self.himap_horizons.get(request.request_id)
        if (
            horizon is not None
            and request.status is RequestStatus.RUNNING
            and new_computed_blocks is None
            and not (args or kwargs)
        ):
            slots = min(end + num_lookahead_tokens, self.max_model_len)
            cacheable = min(end, request.num_tokens)
            if slots <= horizon.fewest_slots and cacheable < horizon.next_cacheable:
                return self.empty_kv_cache_blocks
            return self._grow(request, horizon, slots, cacheable)
        if self.himap_passed.closed and request.status is not RequestStatus.RUNNING:
            return None
        start = request.num_computed_tokens + num_new_computed_tokens
        planned = self.enable_caching and request.request_id in self.himap_plans
        if (
            planned
            and new_computed_blocks is not None
            and self.himap_prefixes.must_wait(request, new_computed_blocks.blocks, start)
        ):
            return None
        blocks = super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            *args,
            **kwargs,
        )
        if blocks is not None:
            self._note_horizon(request, start + num_new_tokens)
            if planned and start < request.num_prompt_tokens:  # the answer when it ends
                self.himap_prefixes.publish(request, start, start + num_new_tokens)
        return blocks

    @override
    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As `KVCacheManager.cache_blocks`."""
        horizon = self.himap_horizons.get(request.request_id)
        if horizon is None:
            super().cache_blocks(request, num_computed_tokens)
        elif num_computed_tokens >= horizon.next_cacheable:
            self._cache_full_blocks(request, horizon, num_computed_tokens)

    @override
    def free(self, request: Request) -> None:
        """As `KVCacheManager.free`, but the blocks nearest to the sequence's end go first."""
        self.block_pool.free_blocks(reversed(self.pop_blocks_for_free(request)))

    @override
    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """As `KVCacheManager.pop_blocks_for_free`.

        Returns:
            The blocks of all groups, in the order in which the sequence reaches them.
        """
        request_id = request.request_id
        self.himap_horizons.pop(request_id, None)
        plan = self.himap_plans.get(request_id)
        if self.enable_caching:
            self.himap_prefixes.publish_rest(request)
        rows: list[tuple[int, tuple[KVCacheBlock, ...]]] = []
        for stage, groups in enumerate(self.himap_stages):
            size = self.himap_block_sizes[stage]
            of_groups = (group.pop_blocks_for_free(request_id) for group in groups)
            for index, row in enumerate(zip(*of_groups, strict=True)):
                start = index * size
                rows.append((start if plan is None else plan.position(stage, start), row))
        rows.sort(key=itemgetter(0))
        return list(chain.from_iterable(row for _, row in rows))

    @override
    def new_step_starts(self) -> None:
        """As `KVCacheManager.new_step_starts`."""
        super().new_step_starts()
        self.himap_prefixes.begin_step()

    @override
    def reset_prefix_cache(self) -> bool:
        """As `KVCacheManager.reset_prefix_cache`."""
        reset = super().reset_prefix_cache()
        if reset:
            self.himap_prefixes.clear()
        return reset

    def _grow(
        self, request: Request, horizon: BlockHorizon, slots: int, cacheable: int
    ) -> KVCacheBlocks | None:
        """Allocate for all groups of the stages that lack a block at once."""
        missing = [
            max(0, cdiv(slots - held, size))
            for held, size in zip(horizon.slots, self.himap_block_sizes, strict=True)
        ]
        wanted = sum(map(mul, missing, map(len, self.himap_stages)))
        if wanted > self.block_pool.get_num_free_blocks():
            return None
        new = iter(self.block_pool.get_new_blocks(wanted))
        blocks: list[Sequence[KVCacheBlock]] = list(self.empty_kv_cache_blocks.blocks)
        for stage, count in enumerate(missing):
            for group in self.himap_stages[stage] if count else ():
                own = blocks[group.kv_cache_group_id] = list(islice(new, count))
                group.append_blocks(request.request_id, own)
            horizon.slots[stage] += count * self.himap_block_sizes[stage]
        horizon.fewest_slots = min(horizon.slots)
        if cacheable >= horizon.next_cacheable:
            self._cache_full_blocks(request, horizon, cacheable)
        return KVCacheBlocks(tuple(blocks)) if wanted else self.empty_kv_cache_blocks

    def _cache_full_blocks(self, request: Request, horizon: BlockHorizon, num_tokens: int) -> None:
        super().cache_blocks(request, num_tokens)
        aligned = self.himap_stages[0][0].scheduler_block_size
        horizon.next_cacheable = (num_tokens // aligned + 1) * aligned

    def _note_horizon(self, request: Request, end: int) -> None:
        """Note how far the blocks reach of a request that has computed `end` tokens, or will."""
        request_id = request.request_id
        self.himap_horizons.pop(request_id, None)
        if end < request.num_prompt_tokens:
            return
        plan = self.himap_plans.get(request_id)
        # The groups of a stage are alike.
        stages = [groups[0].horizon(request_id, plan) for groups in self.himap_stages]
        slots, next_cacheable = zip(*stages, strict=True)
        self.himap_horizons[request_id] = BlockHorizon(list(slots), min(slots), min(next_cacheable))


def make_pruning_manager(
    manager: KVCacheManager,
    stages: Sequence[int],
    plans: Mapping[str, PromptPlan],
    passed: PassedOver,
    hash_function: HashFunction = sha256,
) -> StagePrefixCache:
    """Make the scheduler's manager a `PruningKVCacheManager`.

    Args:
        manager: the scheduler's.
        stages: of each KV cache group.
        plans: of the scheduler's requests.
        passed: those of them that wait.
        hash_function: of the blocks of pruned requests.

    Returns:
        Their prefix cache.
    """
    groups = manager.coordinator.single_type_managers
    for group in groups:
        assert isinstance(group, StageKVCacheManager)
        group.plans = plans
    manager.__class__ = PruningKVCacheManager
    assert isinstance(manager, PruningKVCacheManager)
    manager.himap_plans = plans
    manager.himap_passed = passed
    manager.himap_horizons = {}
    manager.himap_stages = [
        [group for group, of in zip(groups, stages, strict=True) if of == stage]
        for stage in sorted(set(stages))
    ]
    manager.himap_block_sizes = [groups[0].block_size for groups in manager.himap_stages]
    manager.himap_prefixes = StagePrefixCache(
        manager.block_pool, manager.himap_stages, plans, hash_function
    )
    manager.empty_kv_cache_blocks = NoBlocks(manager.empty_kv_cache_blocks.blocks)
    return manager.himap_prefixes
