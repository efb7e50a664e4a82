# SPDX-License-Identifier: Apache-2.0
"""The KV cache groups of an engine: the stage of each, and the sizes of a block.

Seams:

* `vllm.v1.kv_cache_interface.iter_layer_specs` (called): where blocks have several sizes, a group
  on a worker has a spec for each layer. Remove when: a group has one spec again.
* `vllm.v1.kv_cache_interface.KVCacheTensor` (read): where the blocks of a group's layers are.
  Remove when: vLLM checks that pages of different groups don't overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, iter_layer_specs

from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.prompt import NUM_STAGES


@dataclass(frozen=True, slots=True)
class StageGroups:
    """KV cache groups, in vLLM's order.

    Attributes:
        stages: [num_groups] stage of each.
        leaders: [NUM_STAGES] first group of each stage. Its attention metadata is built by vLLM;
            that of the stage's other groups differs in blocks and slots only.
        block_sizes: [NUM_STAGES] tokens per block.
        bytes_per_block: of the pool that all groups share, on this worker.
    """

    stages: list[int]
    leaders: list[int]
    block_sizes: list[int]
    bytes_per_block: int

    @property
    def are_alike(self) -> bool:
        """Whether the blocks of all stages have equally many tokens."""
        return len(set(self.block_sizes)) == 1

    def num_blocks(self, num_tokens: int) -> list[int]:
        """[num_groups] blocks of a sequence that has `num_tokens` tokens in every stage."""
        return [-(-num_tokens // self.block_sizes[stage]) for stage in self.stages]

    @classmethod
    def of(cls, kv_cache_config: KVCacheConfig, stage_layers: Sequence[int]) -> StageGroups:
        """The groups that vLLM made, after checking that they are the planned ones.

        Args:
            kv_cache_config: what vLLM made of the specs.
            stage_layers: [NUM_STAGES] number of layers.

        Raises:
            RuntimeError: the groups are not per stage, so pruning would save nothing or corrupt the
                cache; or groups of a stage are not alike; or pages overlap.
        """
        groups = kv_cache_config.kv_cache_groups
        specs = [_stage_spec(group) for group in groups]
        stages = [spec.stage for spec in specs]
        layers = [0] * NUM_STAGES
        for group, stage in zip(groups, stages, strict=True):
            layers[stage] += len(group.layer_names)
        if layers != list(stage_layers):
            raise RuntimeError(
                f"himap: expected {list(stage_layers)} layers per stage, vLLM grouped {layers}"
            )
        leaders = [stages.index(stage) for stage in range(NUM_STAGES)]
        block_sizes = [specs[leader].block_size for leader in leaders]
        if any(spec.block_size != block_sizes[spec.stage] for spec in specs):
            raise RuntimeError(
                "himap: expected blocks of one size in each stage, vLLM made "
                f"{[(spec.stage, spec.block_size) for spec in specs]} (stage, tokens)"
            )
        pages = [
            len(group.layer_names) * int(spec.page_size_bytes)
            for group, spec in zip(groups, specs, strict=True)
        ]
        found = cls(stages, leaders, block_sizes, max(pages))
        if not found.are_alike:
            _check_pages(kv_cache_config, found.bytes_per_block)
        return found


def _stage_spec(group: KVCacheGroupSpec) -> StageAttentionSpec:
    """The spec of all layers of a group."""
    first, *others = iter_layer_specs(group.kv_cache_spec)
    if not isinstance(first, StageAttentionSpec) or any(spec != first for spec in others):
        raise RuntimeError(
            "himap: expected KV cache groups per stage, vLLM made "
            f"{type(group.kv_cache_spec).__name__} of {', '.join(group.layer_names)}"
        )
    return first


def _check_pages(kv_cache_config: KVCacheConfig, bytes_per_block: int) -> None:
    """Blocks of several sizes can share a pool only if each of them is one run of bytes."""
    for tensor in kv_cache_config.kv_cache_tensors:
        if tensor.block_stride != bytes_per_block or tensor.layer_stride > bytes_per_block:
            raise RuntimeError(
                f"himap: expected blocks of {bytes_per_block} bytes one behind another, vLLM put "
                f"those of {', '.join(tensor.layers)} {tensor.block_stride} bytes apart"
            )
