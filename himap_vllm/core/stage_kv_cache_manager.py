# SPDX-License-Identifier: Apache-2.0
"""KV cache per stage: a spec that keeps the stages apart, and a manager that allocates less.

vLLM gives layers with different specs different KV cache groups, each with block tables of its
own, all from one block pool (hybrid KV cache manager). A stage is such a kind of layer.

Seams:

* `vllm.v1.kv_cache_interface.FullAttentionSpec` (subclassed): a spec with a stage. Remove when: a
  layer can name the KV cache group it belongs to.
* `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager` (subclassed): maps a request's
  tokens to those that reach the stage. Remove when: block counts of a request can be set per group.
* `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager._cache_partial_tail_block`
  (overridden): hits never end inside a block, so its entry for a prompt's end would be found by
  nobody. Remove when: vLLM makes that entry only where hits are finer than blocks.
* `vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry.register` (called): pairs spec and manager.
  Remove when: a spec names its manager.
* `vllm.v1.core.single_type_kv_cache_manager.register_all_kvcache_specs` (called): vLLM fills its
  registry only while it is empty. Registering first would leave a worker process without the
  built-in specs, so they go first. Remove when: the registry merges.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from typing_extensions import override
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from himap_vllm.plan.prompt import PromptPlan


@dataclass(frozen=True, kw_only=True)
class StageAttentionSpec(FullAttentionSpec):
    """Full attention of one part of one stage.

    `merge` and `is_uniform_with_collection` are vLLM's two ways to put layers into one group. The
    inherited `merge` could not build this class. The inherited `is_uniform_with_collection` would
    ignore stage and part: all layers would share block tables, without an error and without a
    saving.

    Attributes:
        stage: of the layer.
        part: of the stage, a KV cache group of its own where blocks have several sizes. Parts are
            equal otherwise, so vLLM looks up prefixes for all parts of a stage at once.
    """

    stage: int
    part: int = field(default=0, compare=False)

    @classmethod
    def of(
        cls, spec: FullAttentionSpec, stage: int, part: int, block_size: int
    ) -> StageAttentionSpec:
        """`spec` with a stage, a part of it and a block size."""
        inherited = {each.name: getattr(spec, each.name) for each in fields(spec)}
        return cls(**{**inherited, "block_size": block_size}, stage=stage, part=part)

    @classmethod
    @override
    def merge(cls, specs: Sequence[Any]) -> Any:
        # AssertionError is how vLLM's grouping learns that specs don't go together.
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different stages need different KV cache groups")
        return copy.deepcopy(specs[0])

    @override
    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            spec == self and isinstance(spec, StageAttentionSpec) and spec.part == self.part
            for spec in kv_cache_specs.values()
        )


class StageKVCacheManager(FullAttentionManager):
    """Allocates, for pruned requests, blocks for the tokens that reach this stage.

    vLLM's managers see request ids only, so each reads the scheduler's `plans`. All of them note in
    `fresh` the ids of blocks that they publish in a step.
    """

    plans: Mapping[str, PromptPlan] = {}
    fresh: set[int]

    def _stage_tokens(self, request_id: str, num_tokens: int) -> int:
        plan = self.plans.get(request_id)
        return (
            num_tokens if plan is None else plan.stage_tokens(self.kv_cache_spec.stage, num_tokens)
        )

    def append_blocks(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """Give a request new blocks, as `allocate_new_blocks` does."""
        self.req_to_blocks[request_id].extend(blocks)
        if self._record_new_block_ids:  # to be zeroed
            self.new_block_ids.extend(block.block_id for block in blocks)

    def _aligned(self, num_tokens: int) -> int:
        """How much of a prefix a hit can use."""
        return num_tokens // self.scheduler_block_size * self.scheduler_block_size

    def horizon(self, request_id: str, plan: PromptPlan | None) -> tuple[int, float]:
        """How far the blocks reach of a request whose prompt has all of its own.

        Returns:
            Tokens of the sequence that have slots, and the number of computed tokens from which on
            there is a block for the prefix cache.
        """
        slots = len(self.req_to_blocks[request_id]) * self.block_size
        if plan is not None:  # its answer is published when it ends
            return slots + plan.removed[self.kv_cache_spec.stage], math.inf
        if not self.enable_caching:
            return slots, math.inf
        cached = self.num_cached_block.get(request_id, 0) * self.block_size
        return slots, self._aligned(cached) + self.scheduler_block_size

    @override
    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        num_blocks: int = super().get_num_blocks_to_allocate(
            request_id,
            self._stage_tokens(request_id, num_tokens),
            new_computed_blocks,
            self._stage_tokens(request_id, total_computed_tokens),
            self._stage_tokens(request_id, num_local_computed_tokens),
            self._stage_tokens(request_id, num_tokens_main_model),
            apply_admission_cap,
            prefill_end,
        )
        return num_blocks

    @override
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        blocks: list[Any] = super().allocate_new_blocks(
            request_id,
            self._stage_tokens(request_id, num_tokens),
            self._stage_tokens(request_id, num_tokens_main_model),
        )
        return blocks

    @override
    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self._stage_tokens(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
        )

    @override
    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Nothing for a pruned request, whose blocks `StagePrefixCache` publishes."""
        request_id = request.request_id
        if request_id in self.plans:
            return
        before = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        after = self.num_cached_block.get(request_id, 0)
        if after > before:
            blocks = self.req_to_blocks[request_id][before:after]
            self.fresh.update(block.block_id for block in blocks)

    @override
    def _cache_partial_tail_block(self, request: Request, num_tokens: int) -> None:
        """Nothing: hits end where blocks do."""


# Every process that meets the spec imports this module for it, and no other process does.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(StageAttentionSpec, StageKVCacheManager, StageAttentionSpec)
