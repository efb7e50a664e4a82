# SPDX-License-Identifier: Apache-2.0
"""Decides, in the API process, what becomes of a request; the rest of the engine only obeys.

Admission resolves the ratios (request, or the server's default) and writes them into the
request's own copy of its sampling parameters, where scheduler and worker read them. A request that
can't have what it asked for is refused here; one that asked for nothing runs unpruned and is
counted as bypassed.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest

from himap_vllm.config import (
    ADMISSION_ARG,
    DEEP_ARG,
    PRUNED,
    SHALLOW_ARG,
    EngineSettings,
    HiMAPError,
    requested_ratios,
)
from himap_vllm.plan.prompt import PromptPlan, make_plan
from himap_vllm.plan.requests import image_tokens, step_limit

Observer = Callable[[EngineCoreRequest, PromptPlan | None], None]
observers: list[Observer] = []
"""Called with every admitted request and its plan (None: unpruned), on the thread that admits."""


def admit(request: EngineCoreRequest, settings: EngineSettings, vllm_config: VllmConfig) -> None:
    """Write the decision into `request.sampling_params.extra_args`.

    Raises:
        HiMAPError: a bad parameter, or pruning asked for that can't be done.
    """
    params = request.sampling_params
    if params is None:
        return
    ratios, asked = requested_ratios(settings, params.extra_args)
    # A copy: the caller may use its parameters again.
    args = {
        key: value
        for key, value in (params.extra_args or {}).items()
        if key not in (SHALLOW_ARG, DEEP_ARG)
    }
    images = image_tokens(request.mm_features)
    num_tokens = len(request.prompt_token_ids or ())
    plan = make_plan(num_tokens, images, ratios)
    if plan is not None or (_has_video(request) and any((ratios.shallow, ratios.deep))):
        obstacle = _obstacle(plan, request, vllm_config)
        if obstacle is None:
            args[ADMISSION_ARG] = PRUNED
            args[SHALLOW_ARG], args[DEEP_ARG] = ratios.shallow, ratios.deep
        elif asked:
            raise HiMAPError(obstacle[1], obstacle[2])
        else:
            args[ADMISSION_ARG] = f"bypassed_{obstacle[0]}"
            plan = None
    params.extra_args = args or None
    for observer in observers:
        observer(request, plan)


def _has_video(request: EngineCoreRequest) -> bool:
    return any(feature.modality != "image" for feature in request.mm_features or ())


def _obstacle(
    plan: PromptPlan | None, request: EngineCoreRequest, vllm_config: VllmConfig
) -> tuple[str, str, str] | None:
    """Why this prompt can't be pruned: (reason for the counters, parameter, message)."""
    params = request.sampling_params
    assert params is not None
    if plan is None or _has_video(request):
        return (
            "video",
            SHALLOW_ARG,
            f"prompts with video are not pruned; set {SHALLOW_ARG} and {DEEP_ARG} to 0",
        )
    if params.prompt_logprobs is not None:
        return (
            "prompt_logprobs",
            "prompt_logprobs",
            "prompt_logprobs can't be combined with pruning: dropped image tokens have no final "
            f"hidden state; set {SHALLOW_ARG} and {DEEP_ARG} to 0",
        )
    if request.resumable:
        return (
            "streaming_input",
            SHALLOW_ARG,
            "a streaming-input session can't be pruned: its prompt is not complete; set "
            f"{SHALLOW_ARG} and {DEEP_ARG} to 0",
        )
    name, limit = step_limit(vllm_config.scheduler_config)
    if plan.one_step_tokens > limit:
        return (
            "too_long",
            SHALLOW_ARG,
            f"this prompt has {plan.one_step_tokens} tokens from its first image to its end; "
            f"pruning computes them in one step, and a step has at most {limit}. Raise "
            f"--{name.replace('_', '-')}, or set {SHALLOW_ARG} and {DEEP_ARG} to 0",
        )
    return None
