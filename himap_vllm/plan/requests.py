# SPDX-License-Identifier: Apache-2.0
"""Plans from vLLM's own request data; the same function serves scheduler, worker and admission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import ModelConfig, SchedulerConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

from himap_vllm.config import ADMISSION_ARG, DEEP_ARG, PRUNED, SHALLOW_ARG, EngineSettings
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios, make_plan


def image_tokens(mm_features: Sequence[MultiModalFeatureSpec] | None) -> list[ImageTokens]:
    """The images of a prompt, in order: vLLM's placeholder positions that hold embeddings."""
    images = [
        ImageTokens(
            tuple((start, end + 1) for start, end in feature.mm_position.extract_embeds_range())
        )
        for feature in mm_features or ()
        if feature.modality == "image" and feature.mm_position.get_num_embeds()
    ]
    return sorted(images, key=lambda image: image.first)


def plan_of(
    num_prompt_tokens: int,
    mm_features: Sequence[MultiModalFeatureSpec] | None,
    sampling_params: Any,
) -> PromptPlan | None:
    """The plan of a request that admission stamped as pruned, with the ratios it decided on.

    A request that reached the engine core on another way has no stamp and runs unpruned: its
    ratios were not checked, nor whether its prompt fits a step.
    """
    args = getattr(sampling_params, "extra_args", None) or {}
    if args.get(ADMISSION_ARG) != PRUNED or not mm_features:
        return None
    ratios = Ratios(args[SHALLOW_ARG], args[DEEP_ARG])
    return make_plan(num_prompt_tokens, image_tokens(mm_features), ratios)


def step_limit(scheduler_config: SchedulerConfig) -> tuple[str, int]:
    """The option that bounds a request's tokens in one step most tightly, and its value."""
    limits = {"max_num_batched_tokens": scheduler_config.max_num_batched_tokens}
    if scheduler_config.max_num_scheduled_tokens is not None:
        limits["max_num_scheduled_tokens"] = scheduler_config.max_num_scheduled_tokens
    if scheduler_config.long_prefill_token_threshold > 0:
        limits["long_prefill_token_threshold"] = scheduler_config.long_prefill_token_threshold
    return min(limits.items(), key=lambda item: item[1])


def stage_layers(settings: EngineSettings, model_config: ModelConfig) -> tuple[int, int, int]:
    """Number of decoder layers of each stage."""
    num_layers = model_config.hf_text_config.num_hidden_layers
    return (
        settings.shallow_layer,
        settings.deep_layer - settings.shallow_layer,
        num_layers - settings.deep_layer,
    )
