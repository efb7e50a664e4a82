# SPDX-License-Identifier: Apache-2.0
"""LoRA: the adapter of each row, in the stages of a step that prunes.

vLLM maps the rows of a step to adapters before the forward pass. Behind a cut there are fewer rows.
All rows of a request take one adapter, and the number of rows left is known. The mapping of a stage
therefore follows from the prompt alone.

* `vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin._set_active_loras`
  (overridden): both runners map a step's rows through it. Remove when: vLLM keeps the adapter of
  each request where the model can read it.
* `vllm.lora.model_manager.LoRAModelManager.set_adapter_mapping` (called): it tells the kernels'
  wrapper, whatever the device. The next step's mapping replaces that of the last stage. Remove
  when: LoRA's kernels take the mapping of a call as an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override
from vllm.lora.layers import LoRAMapping, LoRAMappingType

from himap_vllm.plan.step_layout import StageBatch
from himap_vllm.pruning.context import PruningContext

if TYPE_CHECKING:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin as _Base
else:  # vLLM's runner is next in the method resolution order
    _Base = object


class AdapterMixin(_Base):
    """For the model runners: keeps the adapters of the latest step."""

    himap: PruningContext
    himap_adapters: tuple[int, ...]

    @override
    def _set_active_loras(
        self,
        prompt_lora_mapping: tuple[int, ...],
        token_lora_mapping: tuple[int, ...],
        lora_requests: set[Any],
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
    ) -> None:
        super()._set_active_loras(
            prompt_lora_mapping, token_lora_mapping, lora_requests, mapping_type
        )
        if mapping_type is LoRAMappingType.LANGUAGE:
            self.himap_adapters = prompt_lora_mapping
            self.himap.enter_stage = self._himap_map_rows

    def _himap_map_rows(self, stage: StageBatch) -> None:
        """Map the rows of a later stage of the latest step."""
        adapters = self.himap_adapters  # [num_reqs]: one row is sampled per request
        rows = np.repeat(adapters, np.diff(stage.query_start_loc))
        mapping = LoRAMapping(tuple(rows.tolist()), adapters, is_prefill=True)
        self.lora_manager._adapter_manager.set_adapter_mapping(mapping)
