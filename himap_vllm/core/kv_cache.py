# SPDX-License-Identifier: Apache-2.0
"""KV cache per stage: a spec that keeps the stages apart, and a manager that allocates less.

vLLM gives layers with different specs different KV cache groups, each with block tables of its
own, all from one block pool (hybrid KV cache manager). A stage is such a kind of layer.

Seams:

* `vllm.v1.kv_cache_interface.FullAttentionSpec` (subclassed): a spec with a stage. Remove when: a
  layer can name the KV cache group it belongs to.
* `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager` (subclassed): maps a request's
  tokens to those that reach the stage. Remove when: block counts of a request can be set per group.
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
from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import override
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from himap_vllm.plan.prompt import NUM_STAGES, PromptPlan


@dataclass(frozen=True, kw_only=True)
class StageAttentionSpec(FullAttentionSpec):
    """Full attention of one stage.

    `merge` and `is_uniform_with_collection` are vLLM's two ways to put layers into one group. The
    inherited `merge` could not build this class. The inherited `is_uniform_with_collection` would
    ignore `stage`: all layers would share block tables, without an error and without a saving.
    """

    stage: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> StageAttentionSpec:
        """`spec` with a stage."""
        inherited = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**inherited, stage=stage)

    @classmethod
    @override
    def merge(cls, specs: Sequence[Any]) -> Any:
        # AssertionError is how vLLM's grouping learns that specs don't go together.
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different stages need different KV cache groups")
        return copy.deepcopy(specs[0])

    @override
    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class StageKVCacheManager(FullAttentionManager):
    """Allocates, for pruned requests, blocks for the tokens that reach this stage.

    vLLM's managers see request ids only, so each reads the scheduler's `plans`.
    """

    plans: Mapping[str, PromptPlan] = {}

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

    def horizon(self, request_id: str, plan: PromptPlan | None) -> tuple[int, float] | None:
        """How far the blocks reach of a request whose prompt has all of its own.

        Returns:
            Tokens of the sequence that have slots, and the number of computed tokens from which on
            there is a block for the prefix cache; None if each step has to look.
        """
        slots = len(self.req_to_blocks[request_id]) * self.block_size
        if plan is not None:
            slots += plan.removed[self.kv_cache_spec.stage]
        if not self.enable_caching:
            return slots, math.inf
        if self.block_size != self.block_pool.hash_block_size:
            return None  # a prompt's last block is cached in part
        next_cacheable = (self.num_cached_block.get(request_id, 0) + 1) * self.block_size
        if plan is not None and next_cacheable > plan.first_image_token:
            return slots, math.inf
        return slots, next_cacheable

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
    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache only what lies before a pruned prompt's first image.

        Later blocks hold other tokens than their position's hash says.
        """
        plan = self.plans.get(request.request_id)
        if plan is not None:
            num_tokens = min(num_tokens, plan.first_image_token)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


# Every process that meets the spec imports this module for it, and no other process does.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(StageAttentionSpec, StageKVCacheManager, StageAttentionSpec)


def group_stages(kv_cache_config: KVCacheConfig, stage_layers: Sequence[int]) -> list[int]:
    """Stage of each KV cache group, after checking that vLLM grouped the layers as planned.

    Args:
        kv_cache_config: what vLLM made of the specs.
        stage_layers: number of layers of each stage.

    Raises:
        RuntimeError: the groups are not per stage, so pruning would save nothing or corrupt the
            cache; or their blocks differ in size, so that groups of a stage are not alike.
    """
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) > 1:
        raise RuntimeError(f"himap: expected blocks of one size, vLLM made {sorted(sizes)}")
    stages = []
    layers = [0] * NUM_STAGES
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not isinstance(spec, StageAttentionSpec):
            raise RuntimeError(
                f"himap: expected KV cache groups per stage, vLLM made {type(spec).__name__} of "
                f"{', '.join(group.layer_names)}"
            )
        stages.append(spec.stage)
        layers[spec.stage] += len(group.layer_names)
    if layers != list(stage_layers):
        raise RuntimeError(
            f"himap: expected {list(stage_layers)} layers per stage, vLLM grouped {layers}"
        )
    return stages


def bytes_per_block(kv_cache_config: KVCacheConfig) -> int:
    """Memory of one block of the shared pool, on this worker: that of the largest group."""
    return max(
        len(group.layer_names) * int(group.kv_cache_spec.page_size_bytes)
        for group in kv_cache_config.kv_cache_groups
    )
