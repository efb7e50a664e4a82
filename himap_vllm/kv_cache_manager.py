# SPDX-License-Identifier: Apache-2.0
"""Spares a decoding request the round through every KV cache group.

vLLM's KV cache manager asks each group, four times per request and step, whether there is anything
to do. With three stages of 2, 6 and 24 layers there are 16 groups, and for a batch of 64 decoding
requests that alone took four milliseconds of a step. But the groups of a stage always hold equally
many blocks, and most steps of a request need no new one.

vLLM seam (0.32): `KVCacheManager.allocate_slots`, on the scheduler's one instance. Can go when vLLM
asks one group of those that are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request, RequestStatus

from himap_vllm.kv_cache import StageKVCacheManager


class PruningKVCacheManager(KVCacheManager):
    """vLLM's, with a shorter way for requests that have all the blocks that they need."""

    himap_leaders: Sequence[StageKVCacheManager]

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
        if (
            request.status == RequestStatus.RUNNING
            and new_computed_blocks is None
            and not any(kwargs.get(name) for name in _EXTRAS)
        ):
            end = request.num_computed_tokens + num_new_tokens
            slots = min(end + num_lookahead_tokens, self.max_model_len)
            cacheable = min(end, request.num_tokens)
            request_id = request.request_id
            if all(
                leader.has_blocks(request_id, slots) and leader.has_cached(request_id, cacheable)
                for leader in self.himap_leaders
            ):
                return self.empty_kv_cache_blocks
        return super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            **kwargs,
        )


# Arguments that ask for more than slots.
_EXTRAS = ("num_external_computed_tokens", "delay_cache_blocks", "num_encoder_tokens")


def adopt(manager: KVCacheManager, stages: Sequence[int]) -> None:
    """Make the scheduler's manager a `PruningKVCacheManager`.

    Args:
        manager: the scheduler's.
        stages: of each KV cache group.
    """
    groups = manager.coordinator.single_type_managers
    manager.__class__ = PruningKVCacheManager
    manager.himap_leaders = [groups[stages.index(stage)] for stage in sorted(set(stages))]
