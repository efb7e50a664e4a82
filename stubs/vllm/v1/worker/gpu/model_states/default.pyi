# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.rope_state import RopeState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata, ModelState
from vllm.v1.worker.utils import AttentionGroup

def __getattr__(name: str) -> Any: ...

class DefaultModelState(ModelState):
    rope_state: RopeState | None

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: ModelSpecificAttnMetadata | None = None,
    ) -> dict[str, Any]: ...
