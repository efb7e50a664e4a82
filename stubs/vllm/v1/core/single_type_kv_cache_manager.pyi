# SPDX-License-Identifier: Apache-2.0
from abc import ABC
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

def __getattr__(name: str) -> Any: ...

class SingleTypeKVCacheManager(ABC):
    block_size: int
    scheduler_block_size: int
    kv_cache_spec: Any
    block_pool: BlockPool
    enable_caching: bool
    kv_cache_group_id: int
    req_to_blocks: dict[str, list[KVCacheBlock]]
    num_cached_block: dict[str, int]
    new_block_ids: list[int]
    _record_new_block_ids: bool

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int: ...
    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None: ...
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]: ...
    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]: ...

class FullAttentionManager(SingleTypeKVCacheManager):
    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None: ...
    def _cache_partial_tail_block(self, request: Request, num_tokens: int) -> None: ...
