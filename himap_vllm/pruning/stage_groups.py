# SPDX-License-Identifier: Apache-2.0
"""The KV cache groups of a worker."""

from __future__ import annotations

from typing import Any

from himap_vllm.config import EngineSettings
from himap_vllm.core.stage_groups import StageGroups
from himap_vllm.plan.requests import stage_layers

__all__ = ["StageGroups", "stage_groups"]


def stage_groups(kv_cache_config: Any, settings: EngineSettings, model_config: Any) -> StageGroups:
    """The KV cache groups that vLLM made.

    Raises:
        RuntimeError: they differ from the planned groups.
    """
    return StageGroups.of(kv_cache_config, stage_layers(settings, model_config))
