# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

def __getattr__(name: str) -> Any: ...

class GPUModelRunner(LoRAModelRunnerMixin):
    vllm_config: VllmConfig
    model_config: ModelConfig
    load_config: LoadConfig
    device: torch.device
    jit_warmup_registry: JitWarmupRegistry
    model_memory_usage: int
    model_state: Any
    block_tables: BlockTables
    cudagraph_manager: ModelCudaGraphManager | None

    def load_model(
        self,
        load_dummy_weights: bool = False,
        *args: Any,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None: ...
