# SPDX-License-Identifier: Apache-2.0
"""Pruning plans from vLLM's own request data, for admission, scheduler and worker alike.

Admission stamps each request with its decision. The stamp is one value in
`SamplingParams.extra_args` that only this module reads and writes. Clients may not send it.

* `vllm.multimodal.inputs.PlaceholderRange.extract_embeds_range` (called): which of a placeholder's
  tokens are an image's. Remove when: the positions of image tokens are part of vLLM's public API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from vllm.config import ModelConfig, SchedulerConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams

from himap_vllm.config import EngineSettings
from himap_vllm.plan import cuts
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios, make_plan

_STAMP = "himap_admission"

PROMPT_EMBEDS = "prompt_embeds"
"""vLLM's modality of embedded text. Its rows are text: they vote, and none is dropped."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Admission's decision on a request.

    Attributes:
        outcome: `pruned`, `unpruned` or `bypassed_<reason>`; the counters use it.
        ratios: of each image of a pruned request, in prompt order.
        ends: of each of these images, the end of its unit; empty: one unit that ends with the
            prompt.
        trace: the name under which the worker keeps what survived; None: it keeps nothing.
    """

    outcome: str = "unpruned"
    ratios: tuple[Ratios, ...] = ()
    ends: tuple[int, ...] = ()
    trace: str | None = None


def stamp(params: SamplingParams, decision: Decision) -> None:
    """Write a decision into the request's own parameters, in place of all `himap` arguments."""
    # A copy of the arguments: the caller may use them again.
    args = {
        key: value
        for key, value in (params.extra_args or {}).items()
        if not str(key).startswith("himap")
    }
    if decision != Decision():
        ratios = [astuple(ratios) for ratios in decision.ratios]
        ends = list(decision.ends)
        args[_STAMP] = (decision.outcome, ratios, ends, decision.trace)
    params.extra_args = args or None


def read_stamp(params: Any) -> Decision:
    """Return the decision that a request carries (vLLM's `SamplingParams`, or None).

    A request that reached the engine core in another way has no stamp and runs unpruned: neither
    its ratios nor the length of its prompt were checked.
    """
    stamped = (getattr(params, "extra_args", None) or {}).get(_STAMP)
    if stamped is None:
        return Decision()
    outcome, ratios, ends, trace = stamped
    return Decision(outcome, tuple(Ratios(*pair) for pair in ratios), tuple(ends), trace)


def plan_of(
    num_prompt_tokens: int,
    mm_features: Sequence[MultiModalFeatureSpec] | None,
    sampling_params: Any,
) -> PromptPlan | None:
    """The plan of a request that admission stamped as pruned, as it decided."""
    decision = read_stamp(sampling_params)
    if not decision.ratios:
        return None
    images = image_tokens(mm_features)
    return make_plan(num_prompt_tokens, images, decision.ratios, decision.ends)


def image_tokens(mm_features: Sequence[MultiModalFeatureSpec] | None) -> list[ImageTokens]:
    """The images of a prompt, in order: vLLM's placeholder positions that hold embeddings."""
    places = [feature.mm_position for feature in mm_features or () if feature.modality == "image"]
    return [
        ImageTokens(tuple((start, end + 1) for start, end in place.extract_embeds_range()))
        for place in sorted(places, key=lambda place: place.offset)
    ]


def step_limit(scheduler_config: SchedulerConfig) -> tuple[str, int]:
    """The option that bounds a request's tokens in one step most tightly, and its value."""
    limits = {"max_num_batched_tokens": scheduler_config.max_num_batched_tokens}
    if scheduler_config.max_num_scheduled_tokens is not None:
        limits["max_num_scheduled_tokens"] = scheduler_config.max_num_scheduled_tokens
    if scheduler_config.long_prefill_token_threshold > 0:
        limits["long_prefill_token_threshold"] = scheduler_config.long_prefill_token_threshold
    return min(limits.items(), key=lambda item: item[1])


def stage_layers(settings: EngineSettings, model_config: ModelConfig) -> tuple[int, int, int]:
    """Number of decoder layers of each stage of an engine's model."""
    num_layers = model_config.hf_text_config.num_hidden_layers
    return cuts.stage_layers(settings.shallow_layer, settings.deep_layer, num_layers)
