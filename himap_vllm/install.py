# SPDX-License-Identifier: Apache-2.0
"""Turns a freshly loaded vLLM model into one that can prune."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from himap_vllm.attention import install_stage, install_votes
from himap_vllm.config import engine_settings
from himap_vllm.decoder import install_segments
from himap_vllm.models import FAMILIES
from himap_vllm.pruning import PruningState
from himap_vllm.recorder import Recorder


def install(model: nn.Module, vllm_config: VllmConfig) -> PruningState:
    """Install stages, votes and segments; returns the state they share with the runner."""
    settings = engine_settings(vllm_config.additional_config)
    assert settings is not None, "installed only with himap settings"
    state = PruningState(settings, Recorder(settings))
    architecture = vllm_config.model_config.architecture
    decoder: Any = FAMILIES[architecture].decoder(model)
    names = []
    for index, layer in enumerate(decoder.layers):
        (attention,) = (m for m in layer.modules() if isinstance(m, Attention))
        names.append(attention.layer_name)
        stage = int(index >= settings.shallow_layer) + int(index >= settings.deep_layer)
        install_stage(attention, stage, state)
        if index == settings.shallow_layer - 1:
            install_votes(attention, 0, state)
        if index == settings.deep_layer - 1:
            install_votes(attention, 1, state)
    install_segments(decoder, names, state, vllm_config)
    return state
