# SPDX-License-Identifier: Apache-2.0
"""Attention layers that belong to a stage and score image tokens.

Each layer is changed in place, on the instance, after the model is loaded. The classes, and with
them every other model of the process, stay as they are.

* `vllm.model_executor.layers.attention.attention.Attention.get_kv_cache_spec` (overridden):
  the stage goes into the spec. vLLM's own layers with special specs override the same method
  (`RSWAAttention`). Remove when: vLLM lets a plugin put a layer into a KV cache group.
* `vllm.model_executor.layers.attention.attention.Attention.attn_backend` (overridden): a
  backend whose metadata builder sees the step as the layer's stage does. Remove when: vLLM lets a
  layer choose its metadata builder.
* `vllm.v1.attention.backend.AttentionBackend.supported_kv_cache_layouts` (overridden): the layout
  with blocks of several sizes. Remove when: vLLM chooses block sizes of groups that are unequal.
* `vllm.v1.attention.backend.subclass_attention_backend` (called): makes that backend, as vLLM does
  for chunked local attention. Remove when: vLLM lets a layer choose its metadata builder.
* `vllm.v1.attention.backend.AttentionMetadataBuilder.build`,
  `vllm.v1.attention.backend.AttentionMetadataBuilder.update_block_table` (overridden): the metadata
  of a stage, and that of another group of the same stage. Remove when: vLLM lets a layer choose its
  metadata builder.
* `vllm.model_executor.layers.attention.attention.Attention.sliding_window` (read): scores are of
  all keys, so layers with a window are refused. Remove when: vLLM offers a hook for attention
  scores.
* `vllm.v1.attention.backend.AttentionImpl.forward` (wrapped): q and k of the two layers before the
  cuts are read there, inside the opaque attention op, which torch.compile does not look into.
  Remove when: vLLM offers a hook for attention scores.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from himap_vllm.core.kv_cache import StageAttentionSpec
from himap_vllm.kernels.importance import KeyPages
from himap_vllm.model.cached_keys import key_reader
from himap_vllm.pruning.kv_groups import KVGroups, packed_layouts
from himap_vllm.pruning.stage_metadata import shallow_copy

if TYPE_CHECKING:
    from himap_vllm.pruning.context import PruningContext


@dataclass(frozen=True, slots=True)
class StagePlace:
    """The place of a layer: the `index`-th of `stage`. `groups` are those of the model."""

    stage: int
    index: int
    groups: KVGroups


def install_stage(attention: Attention, place: StagePlace, context: PruningContext) -> None:
    """Make `attention` a layer of a stage: its KV cache spec and its metadata builder.

    Raises:
        ValueError: the layer is not plain full attention, or its backend is not supported.
    """
    # Checked even if nothing votes: other backends keep lengths and blocks elsewhere.
    key_reader(attention.attn_backend.get_name())
    base_spec, base_backend = attention.get_kv_cache_spec, attention.attn_backend

    def get_kv_cache_spec(vllm_config: Any) -> StageAttentionSpec:
        spec = base_spec(vllm_config)
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"himap: {attention.layer_name} has {type(spec).__name__}; only full attention "
                "is supported"
            )
        grouping = place.groups.choose(base_backend, spec, vllm_config.cache_config)
        part = 0
        if not grouping.is_uniform:
            attention.attn_backend = _stage_backend(base_backend, packed=True)
            part = place.index % grouping.parts[place.stage]
        return StageAttentionSpec.of(spec, place.stage, part, grouping.block_sizes[place.stage])

    attention.get_kv_cache_spec = get_kv_cache_spec
    attention.attn_backend = _stage_backend(base_backend, packed=False)
    attention.himap_context = context


def check_plain_softmax(attention: Attention) -> None:
    """Raise ValueError unless a layer's attention is a plain softmax of all scaled products.

    Scores are computed from such a softmax.
    """
    extras: dict[str, Any] = {"sliding_window": attention.sliding_window}
    for name in ("logits_soft_cap", "alibi_slopes", "sinks"):
        extras[name] = getattr(attention.impl, name, None)
    for extra, value in extras.items():
        if value is not None and not (isinstance(value, int | float) and value == 0):
            raise ValueError(f"himap: {attention.layer_name} has {extra}, which is not supported")


def install_votes(attention: Attention, cut: int, context: PruningContext) -> None:
    """Score the image tokens for `cut` whenever `attention` runs in a step that prunes.

    Raises:
        ValueError: as `check_plain_softmax` does.
    """
    check_plain_softmax(attention)
    impl = attention.impl
    base_forward = impl.forward
    read_keys = key_reader(attention.attn_backend.get_name())

    @functools.wraps(base_forward)
    def forward(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        step = context.step
        # Metadata is absent in profiling and warm-up runs.
        if step is not None and attn_metadata is not None:

            def cached_keys(requests: slice, longest: int) -> KeyPages:
                return read_keys(layer, kv_cache, attn_metadata.block_table[requests], longest)

            step.cuts[cut].score(query, key, impl.scale, cached_keys)
        return base_forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    impl.forward = forward


@functools.cache
def _stage_backend(base: type[AttentionBackend], packed: bool) -> type[AttentionBackend]:
    """`base` with a metadata builder that sees each step as its layers' stage does.

    Args:
        base: vLLM's.
        packed: a block holds all layers of its group, one behind another.
    """
    base_builder: Any = base.get_builder_cls()

    class StageBuilder(base_builder):
        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            self._himap_context: PruningContext = layer.himap_context

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            stages = self._himap_context.stage_metadata
            own = None if stages is None else stages[self.kv_cache_spec.stage]
            if own is not None:
                common_attn_metadata = own.apply(common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def update_block_table(
            self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
        ) -> Any:
            """Derive a group's metadata from another group of its stage, for both model runners."""
            if base_builder.supports_update_block_table:
                return super().update_block_table(metadata, blk_table, slot_mapping)
            metadata = shallow_copy(metadata)
            metadata.block_table = blk_table
            metadata.slot_mapping = slot_mapping
            return metadata

    backend: type[AttentionBackend] = subclass_attention_backend("HiMAP", base, StageBuilder)
    if packed:
        layouts = packed_layouts(base)
        backend.supported_kv_cache_layouts = classmethod(lambda _: layouts)
    return backend
