# SPDX-License-Identifier: Apache-2.0
"""The KV cache groups of a worker: the stage of each, and the memory of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from himap_vllm.config import EngineSettings
from himap_vllm.core.kv_cache import bytes_per_block, group_stages
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.requests import stage_layers


@dataclass(frozen=True, slots=True)
class StageGroups:
    """KV cache groups, in vLLM's order.

    Attributes:
        stages: [num_groups] stage of each.
        leaders: [NUM_STAGES] first group of each stage. Its attention metadata is built by vLLM;
            that of the stage's other groups differs in blocks and slots only.
        bytes_per_block: of the pool that all groups share, on this worker.
    """

    stages: list[int]
    leaders: list[int]
    bytes_per_block: int

    @classmethod
    def of(cls, kv_cache_config: Any, settings: EngineSettings, model_config: Any) -> StageGroups:
        """The groups that vLLM made.

        Raises:
            RuntimeError: they differ from the planned groups.
        """
        stages = group_stages(kv_cache_config, stage_layers(settings, model_config))
        leaders = [stages.index(stage) for stage in range(NUM_STAGES)]
        return cls(stages, leaders, bytes_per_block(kv_cache_config))
