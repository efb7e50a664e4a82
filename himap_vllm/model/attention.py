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
  `himap analyze` reads all tensors of all layers. Remove when: vLLM offers a hook for attention
  scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from typing_extensions import override
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
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


class AttentionCall(NamedTuple):
    """What an attention layer computes with in a step, as vLLM gives it to `AttentionImpl`.

    Attributes:
        layer: vLLM's.
        query: [num_tokens, num_heads, head_size], rotary applied.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        value: [num_tokens, num_kv_heads, head_size].
        kv_cache: of the layer.
        metadata: the backend's.
        output: of `query`'s shape, or flat; filled by the layer.
    """

    layer: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    metadata: Any
    output: torch.Tensor


def wrap_forward(
    impl: Any,
    before: Callable[[AttentionCall], None] | None = None,
    after: Callable[[AttentionCall], None] | None = None,
) -> None:
    """Let functions see each call of an `AttentionImpl`, but not those without metadata.

    Metadata is absent in profiling and warm-up runs.
    """
    base_forward = impl.forward

    @functools.wraps(base_forward)
    def forward(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = AttentionCall(layer, query, key, value, kv_cache, attn_metadata, output)
        if before is not None and attn_metadata is not None:
            before(call)
        result = base_forward(*call, *args, **kwargs)
        if after is not None and attn_metadata is not None:
            after(call)
        return result

    impl.forward = forward


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
    scale = attention.impl.scale
    read_keys = key_reader(attention.attn_backend.get_name())

    def score(call: AttentionCall) -> None:
        step = context.step
        if step is not None:

            def cached_keys(requests: slice, longest: int) -> KeyPages:
                blocks = call.metadata.block_table[requests]
                return read_keys(call.layer, call.kv_cache, blocks, longest)

            step.cuts[cut].score(call.query, call.key, scale, cached_keys)

    wrap_forward(attention.impl, before=score)


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

        @override
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

        @override
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
