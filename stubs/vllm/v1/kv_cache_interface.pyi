# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any, Self

import torch

def __getattr__(name: str) -> Any: ...

@dataclass(frozen=True)
class KVCacheSpec:
    block_size: int

    @property
    def page_size_bytes(self) -> int: ...
    @classmethod
    def merge(cls, specs: list[Self]) -> Self: ...
    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool: ...

@dataclass(frozen=True, kw_only=True)
class AttentionSpec(KVCacheSpec):
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec(AttentionSpec):
    @classmethod
    def merge(cls, specs: list[Self]) -> Self: ...

@dataclass
class KVCacheGroupSpec:
    layer_names: list[str]
    kv_cache_spec: KVCacheSpec

@dataclass
class KVCacheConfig:
    num_blocks: int
    kv_cache_tensors: list[Any]
    kv_cache_groups: list[KVCacheGroupSpec]
