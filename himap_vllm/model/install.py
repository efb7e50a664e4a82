# SPDX-License-Identifier: Apache-2.0
"""Turn a freshly loaded vLLM model into one that can prune."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from himap_vllm.config import engine_settings
from himap_vllm.criteria import CRITERIA
from himap_vllm.model.attention import StagePlace, install_stage, install_votes
from himap_vllm.model.families import FAMILIES
from himap_vllm.model.segmented_decoder import install_segments
from himap_vllm.pruning.context import Heads, PruningContext
from himap_vllm.pruning.kv_groups import KVGroups
from himap_vllm.pruning.prior import PriorTable


def install(model: nn.Module, vllm_config: VllmConfig) -> PruningContext:
    """Install stages, votes and segments; returns the context they share with the runner."""
    settings = engine_settings(vllm_config.additional_config)
    assert settings is not None, "installed only with himap settings"
    architecture = vllm_config.model_config.architecture
    decoder: Any = FAMILIES[architecture].decoder(model)
    attentions = [attention_of(layer) for layer in decoder.layers]
    first = attentions[0]
    heads = Heads(first.num_heads, first.num_kv_heads, first.head_size)
    shallow, deep = settings.criteria
    criteria = CRITERIA[shallow], CRITERIA[deep]
    context = PruningContext(settings, heads, criteria, PriorTable.load(settings))
    votes = [criterion.select_voters is not None for criterion in context.criteria]
    first_layers = 0, settings.shallow_layer, settings.deep_layer
    groups = KVGroups(settings, len(attentions))
    for index, attention in enumerate(attentions):
        stage = int(index >= settings.shallow_layer) + int(index >= settings.deep_layer)
        place = StagePlace(stage, index - first_layers[stage], groups)
        install_stage(attention, place, context)
        if votes[0] and index == settings.shallow_layer - 1:
            install_votes(attention, 0, context)
        if votes[1] and index == settings.deep_layer - 1:
            install_votes(attention, 1, context)
    names = [attention.layer_name for attention in attentions]
    install_segments(decoder, names, context, vllm_config)
    return context


def attention_of(layer: nn.Module) -> Attention:
    """The attention of a decoder layer."""
    (attention,) = (module for module in layer.modules() if isinstance(module, Attention))
    return attention
