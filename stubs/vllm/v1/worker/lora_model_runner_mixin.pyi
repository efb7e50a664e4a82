# SPDX-License-Identifier: Apache-2.0
from typing import Any

from vllm.lora.layers import LoRAMappingType
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

def __getattr__(name: str) -> Any: ...

class LoRAModelRunnerMixin:
    lora_manager: LRUCacheWorkerLoRAManager

    def _set_active_loras(
        self,
        prompt_lora_mapping: tuple[int, ...],
        token_lora_mapping: tuple[int, ...],
        lora_requests: set[LoRARequest],
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
    ) -> None: ...
