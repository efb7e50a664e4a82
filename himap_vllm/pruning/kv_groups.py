# SPDX-License-Identifier: Apache-2.0
"""Which KV cache groups the loaded model asks vLLM for, and those that vLLM made.

vLLM makes a group of each part of a stage by itself, if the specs have block sizes that differ and
the layout puts all layers of a block one behind another. It asks for specs after the model is
loaded and block sizes are settled, and for layouts after that.

* `vllm.v1.attention.backend.AttentionBackend.get_supported_kernel_block_sizes`,
  `vllm.v1.attention.backend.AttentionBackend.supported_kv_cache_layouts` (called): what the kernels
  take. Remove when: vLLM chooses block sizes of groups that are unequal.
* `vllm.config.CacheConfig.user_specified_block_size` (read): a block size that somebody asked for
  is the smallest one. Remove when: vLLM chooses block sizes of groups that are unequal.
* `vllm.envs.VLLM_KV_CACHE_LAYOUT` (read): a layout that somebody asked for may not have such
  blocks. Remove when: vLLM chooses block sizes of groups that are unequal.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from himap_vllm.config import EngineSettings
from himap_vllm.core.stage_groups import StageGroups
from himap_vllm.plan import requests
from himap_vllm.plan.cuts import TOLERATED_WASTE, stage_layers
from himap_vllm.plan.grouping import Grouping, choose_grouping

__all__ = ["KVGroups", "StageGroups", "made_groups", "packed_layouts"]

logger = init_logger("vllm.himap")


class KVGroups:
    """The KV cache groups of a model, chosen when vLLM asks for the first layer's spec."""

    def __init__(self, settings: EngineSettings, num_layers: int) -> None:
        self._settings = settings
        self._stage_layers = stage_layers(settings.shallow_layer, settings.deep_layer, num_layers)
        self._chosen: Grouping | None = None

    def choose(
        self, backend: type[AttentionBackend], spec: FullAttentionSpec, cache_config: Any
    ) -> Grouping:
        """The groups.

        Args:
            backend: of the decoder's attention.
            spec: of one of its layers, as vLLM would have it.
            cache_config: the engine's.
        """
        if self._chosen is None:
            self._chosen = self._choose(backend, spec, cache_config)
            self._warn(self._chosen)
        return self._chosen

    def _warn(self, chosen: Grouping) -> None:
        """Of waste that the API process could not know; it warns of "many"."""
        wanted = self._settings.kv_grouping
        if wanted != "many" and chosen.wasted_share > TOLERATED_WASTE:
            logger.warning_once(
                "himap: the KV cache groups of stages of %s layers waste %.1f %% of the KV cache "
                "memory; other cuts waste less",
                ", ".join(map(str, self._stage_layers)),
                100 * chosen.wasted_share,
            )

    def _choose(
        self, backend: type[AttentionBackend], spec: FullAttentionSpec, cache_config: Any
    ) -> Grouping:
        layers, size = self._stage_layers, spec.block_size
        wanted = self._settings.kv_grouping
        if wanted != "many":
            obstacle = _obstacle(backend, spec)
            if obstacle is None:
                asked_for = cache_config.user_specified_block_size
                unit = size if asked_for else _kernel_unit(backend, spec)
                found = choose_grouping(wanted, layers, size, unit)
                if wanted == "few" and found.num_groups > len(layers):
                    logger.warning_once(
                        'himap: kv_grouping is "balanced" instead of "few", because one group for '
                        "each of the stages, of %s layers, would waste more than %.0f %% of the KV "
                        "cache memory",
                        ", ".join(map(str, layers)),
                        100 * TOLERATED_WASTE,
                    )
                return found
            logger.warning_once(
                'himap: kv_grouping is "many" instead of "%s", because %s', wanted, obstacle
            )
        return choose_grouping("many", layers, size, size)


def made_groups(kv_cache_config: Any, settings: EngineSettings, model_config: Any) -> StageGroups:
    """The KV cache groups that vLLM made.

    Raises:
        RuntimeError: they differ from the planned groups.
    """
    return StageGroups.of(kv_cache_config, requests.stage_layers(settings, model_config))


def packed_layouts(backend: type[AttentionBackend]) -> tuple[KVCacheLayout, ...]:
    """Layouts with all layers of a block one behind another, and in each what the kernels take.

    The kernels are told how far blocks lie apart, and that is all that these layouts change.
    """
    packed = KVCacheLayout.BLNHC, KVCacheLayout.BLHNC
    declared = backend.supported_kv_cache_layouts()
    if declared is None:
        return packed
    interiors = [layout.layer_view_order for layout in declared if layout.is_block_compact]
    return tuple(layout for layout in packed if layout.layer_view_order in interiors)


def _kernel_unit(backend: type[AttentionBackend], spec: FullAttentionSpec) -> int:
    """Blocks may have any multiple of this; 0 if the kernels take certain sizes only."""
    sizes = backend.get_supported_kernel_block_sizes(spec)
    bases = [size.base for size in sizes if isinstance(size, MultipleOf)]
    return lcm(*bases) if bases else 0


def _obstacle(backend: type[AttentionBackend], spec: FullAttentionSpec) -> str | None:
    """Why blocks can't have several sizes; None if they can."""
    name, unit = backend.get_name(), _kernel_unit(backend, spec)
    layouts = [layout.name for layout in packed_layouts(backend)]
    if not unit:
        return f"{name} takes blocks of certain sizes only"
    if spec.block_size % unit:
        return f"{name} takes multiples of {unit} tokens, and a block has {spec.block_size}"
    if not layouts:
        return f"{name} can't have all layers of a block one behind another"
    if envs.VLLM_KV_CACHE_LAYOUT not in (None, *layouts):
        return f"VLLM_KV_CACHE_LAYOUT is {envs.VLLM_KV_CACHE_LAYOUT}, not {' or '.join(layouts)}"
    return None
