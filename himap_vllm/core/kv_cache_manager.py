# SPDX-License-Identifier: Apache-2.0
"""Spares a decoding request the round through every KV cache group.

vLLM's KV cache manager asks each group, four times per request and step (five with async
scheduling), whether there is anything to do. With three stages of 2, 6 and 24 layers there are 16
groups, and for a batch of 64 decoding requests that alone took four milliseconds of a step. But the
groups of a stage always hold equally many blocks, and most steps of a request need no new one: how
far a request's blocks reach is worked out when it gets them, and a step only compares.

vLLM seams (0.32), on the scheduler's one instance: `KVCacheManager.allocate_slots`, `cache_blocks`,
the two methods that end a request's blocks, `empty_kv_cache_blocks`; `BlockPool.get_new_blocks`,
for all groups at once. Can go when vLLM asks one group of those that are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import mul
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from himap_vllm.core.kv_cache import StageKVCacheManager
from himap_vllm.plan.prompt import PromptPlan


@dataclass(slots=True)
class Reach:
    """Numbers of tokens up to which a request past its prompt needs nothing of the manager.

    Attributes:
        slots: it has slots for as many, in each stage.
        shortest: the least of these.
        publish: with fewer, it has no block to publish to the prefix cache.
    """

    slots: list[int]
    shortest: int
    publish: float


class NoBlocks(KVCacheBlocks):
    """The answer to a request that needs none, without a look at every group."""

    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        """As `KVCacheBlocks.get_block_ids`."""
        return None if allow_none else super().get_block_ids(**kwargs)


class PruningKVCacheManager(KVCacheManager):
    """vLLM's, with a shorter way for requests that decode."""

    himap_plans: Mapping[str, PromptPlan]
    himap_stages: Sequence[Sequence[StageKVCacheManager]]
    himap_reach: dict[str, Reach]

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As `KVCacheManager.allocate_slots`, whose answer is the same."""
        end = request.num_computed_tokens + num_new_tokens
        reach = self.himap_reach.get(request.request_id)
        if (
            reach is not None
            and request.status is RequestStatus.RUNNING
            and new_computed_blocks is None
            and not kwargs
        ):
            slots = min(end + num_lookahead_tokens, self.max_model_len)
            cacheable = min(end, request.num_tokens)
            if slots <= reach.shortest and cacheable < reach.publish:
                return self.empty_kv_cache_blocks
            return self._grow(request, reach, slots, cacheable)
        blocks = super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            **kwargs,
        )
        if blocks is not None:
            self._see(request, end + num_new_computed_tokens)
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As `KVCacheManager.cache_blocks`."""
        reach = self.himap_reach.get(request.request_id)
        if reach is None:
            super().cache_blocks(request, num_computed_tokens)
        elif num_computed_tokens >= reach.publish:
            self._publish(request, reach, num_computed_tokens)

    def free(self, request: Request) -> None:
        """As `KVCacheManager.free`."""
        self.himap_reach.pop(request.request_id, None)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """As `KVCacheManager.pop_blocks_for_free`."""
        self.himap_reach.pop(request.request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request)
        return blocks

    def _grow(
        self, request: Request, reach: Reach, slots: int, cacheable: int
    ) -> KVCacheBlocks | None:
        """Allocate for all groups of the stages that lack a block at once."""
        size = self.himap_stages[0][0].block_size
        missing = [max(0, cdiv(slots - held, size)) for held in reach.slots]
        wanted = sum(map(mul, missing, map(len, self.himap_stages)))
        if wanted > self.block_pool.get_num_free_blocks():
            return None
        new = iter(self.block_pool.get_new_blocks(wanted))
        blocks: list[Sequence[KVCacheBlock]] = list(self.empty_kv_cache_blocks.blocks)
        for stage, count in enumerate(missing):
            for group in self.himap_stages[stage] if count else ():
                own = blocks[group.kv_cache_group_id] = list(islice(new, count))
                group.append_blocks(request.request_id, own)
            reach.slots[stage] += count * size
        reach.shortest = min(reach.slots)
        if cacheable >= reach.publish:
            self._publish(request, reach, cacheable)
        return self.create_kv_cache_blocks(tuple(blocks))

    def _publish(self, request: Request, reach: Reach, num_tokens: int) -> None:
        super().cache_blocks(request, num_tokens)
        size = self.himap_stages[0][0].block_size
        reach.publish = (num_tokens // size + 1) * size

    def _see(self, request: Request, end: int) -> None:
        """Note how far the blocks of a request reach that has computed `end` tokens, or will."""
        request_id = request.request_id
        self.himap_reach.pop(request_id, None)
        if end < request.num_prompt_tokens:
            return
        plan = self.himap_plans.get(request_id)
        leaders = [groups[0] for groups in self.himap_stages]
        reaches = [leader.reach(request_id, plan) for leader in leaders]
        if None not in reaches:
            slots, publish = zip(*reaches, strict=True)
            self.himap_reach[request_id] = Reach(list(slots), min(slots), min(publish))


def adopt(manager: KVCacheManager, stages: Sequence[int], plans: Mapping[str, PromptPlan]) -> None:
    """Make the scheduler's manager a `PruningKVCacheManager`.

    Args:
        manager: the scheduler's.
        stages: of each KV cache group.
        plans: of the scheduler's requests.
    """
    groups = manager.coordinator.single_type_managers
    manager.__class__ = PruningKVCacheManager
    manager.himap_plans = plans
    manager.himap_reach = {}
    manager.himap_stages = [
        [group for group, of in zip(groups, stages, strict=True) if of == stage]
        for stage in sorted(set(stages))
    ]
    manager.empty_kv_cache_blocks = NoBlocks(manager.empty_kv_cache_blocks.blocks)
