# SPDX-License-Identifier: Apache-2.0
from abc import ABC
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

def __getattr__(name: str) -> Any: ...

class ModelState(ABC):
    vllm_config: VllmConfig
    model_config: ModelConfig
    model: nn.Module
    device: torch.device
    max_num_reqs: int
    dtype: torch.dtype

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None: ...
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None: ...
    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None: ...
