# SPDX-License-Identifier: Apache-2.0
"""Decide in the API process how a request is pruned. The rest of the engine follows the decision.

Admission resolves the ratios of each image (the request's, or the server's default), finds the ends
of the prompt's units, and stamps the request with its decision. If a request asks for pruning and
cannot be pruned, admission refuses it. A request that did not ask runs unpruned instead, and is
counted as bypassed.

* `vllm.sampling_params.SamplingParams.skip_reading_prefix_cache` (read): set for a request that
  asks for its trace, because nothing is known of images that it would find. Remove when: cached
  blocks can tell which tokens they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm.config import SchedulerConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from himap_vllm.config import (
    DEEP_ARG,
    SHALLOW_ARG,
    EngineSettings,
    HiMAPError,
    Votes,
    engine_settings,
    requested_ratios,
    requested_trace,
)
from himap_vllm.frontend.turns import turn_marker
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, make_plan
from himap_vllm.plan.requests import PROMPT_EMBEDS, Decision, image_tokens, stamp, step_limit
from himap_vllm.plan.turns import ends_of_images, ends_of_turns

SecondStep = Callable[[EngineCoreRequest, PromptPlan | None], None]
"""Called with an admitted request and its plan (None: unpruned); raises to refuse the request."""

_PRUNABLE = ("image", PROMPT_EMBEDS)
"""Modalities that a pruned prompt may have."""

_WHOLE_PROMPT = ("prompt_logprobs", "prompt_logprob_token_ids")
"""Sampling parameters that ask for the final hidden state of every token of the prompt."""

_UNPRUNED = f"set {SHALLOW_ARG} and {DEEP_ARG} to 0"


class _Obstacle(NamedTuple):
    """Why a prompt cannot be pruned: the reason for counters, the parameter, the message."""

    reason: str
    parameter: str
    message: str


class Admission:
    """One engine's admission.

    Attributes:
        second_step: what else admits requests, on the same thread; None: nothing.
    """

    def __init__(
        self,
        settings: EngineSettings,
        scheduler_config: SchedulerConfig,
        marker: Sequence[int] = (),
    ) -> None:
        """
        Args:
            settings: of the engine.
            scheduler_config: vLLM's.
            marker: token ids that open a turn of the assistant; empty: a prompt is one turn.
        """
        self.second_step: SecondStep | None = None
        self._settings = settings
        self._marker = marker
        self._limit_name, self._step_limit = step_limit(scheduler_config)

    def admit(self, request: EngineCoreRequest) -> None:
        """Stamp a request with the decision on it.

        Raises:
            HiMAPError: a parameter is invalid, or the request asks for pruning and cannot be
                pruned.
        """
        params = request.sampling_params
        if params is None:
            return
        images = image_tokens(request.mm_features)
        ratios = requested_ratios(self._settings, params.extra_args, len(images))
        tokens = request.prompt_token_ids or []
        ends = self._ends(tokens, images, ratios.votes)
        plan = make_plan(len(tokens), images, ratios.images, ends)
        trace = requested_trace(params.extra_args)
        decision = Decision()
        other = _other_modality(request) if ratios.prunes else None
        if plan is not None or other is not None:
            obstacle = self._obstacle(plan, other, request, params)
            if obstacle is None:
                decision = Decision("pruned", ratios.images, ends, trace)
                if trace is not None:
                    params.skip_reading_prefix_cache = True
            elif ratios.asked:
                raise HiMAPError(obstacle.parameter, obstacle.message)
            else:
                decision = Decision(f"bypassed_{obstacle.reason}")
                plan = None
        stamp(params, decision)
        if self.second_step is not None:
            self.second_step(request, plan)

    def _ends(
        self, token_ids: Sequence[int], images: Sequence[ImageTokens], votes: Votes
    ) -> tuple[int, ...]:
        """`Decision.ends` of a prompt."""
        if not self._settings.needs_text:
            return tuple(ends_of_images(images))
        if votes == "all" or not self._marker:
            return ()
        ends = tuple(ends_of_turns(token_ids, images, self._marker))
        return () if set(ends) == {len(token_ids)} else ends

    def _obstacle(
        self,
        plan: PromptPlan | None,
        other_modality: str | None,
        request: EngineCoreRequest,
        params: SamplingParams,
    ) -> _Obstacle | None:
        if plan is None or other_modality is not None:
            return _Obstacle(
                str(other_modality),
                SHALLOW_ARG,
                f"prompts with {other_modality} are not pruned; {_UNPRUNED}",
            )
        for name in _WHOLE_PROMPT:
            if getattr(params, name) is not None:
                return _Obstacle(
                    "prompt_logprobs",
                    name,
                    f"{name} can't be combined with pruning: dropped image tokens have no final "
                    f"hidden state; {_UNPRUNED}",
                )
        if request.resumable:
            return _Obstacle(
                "streaming_input",
                SHALLOW_ARG,
                "a streaming-input session can't be pruned: its prompt is not complete; "
                f"{_UNPRUNED}",
            )
        if plan.longest_unit > self._step_limit:
            return _Obstacle(
                "too_long",
                SHALLOW_ARG,
                f"this prompt has {plan.longest_unit} tokens from an image to the end of "
                f"{'the prompt' if len(plan.units) == 1 else 'its turn'}; pruning computes them "
                f"in one step, and a step has at most {self._step_limit}. "
                f"Raise --{self._limit_name.replace('_', '-')}, or {_UNPRUNED}",
            )
        return None


def admission_of(input_processor: Any) -> Admission | None:
    """The admission of the engine that vLLM's `InputProcessor` belongs to; None: no pruning.

    Made when first asked for, once per engine.
    """
    processor = vars(input_processor)
    if "himap_admission" not in processor:
        config = input_processor.vllm_config
        settings = engine_settings(config.additional_config)
        processor["himap_admission"] = settings and Admission(
            settings, config.scheduler_config, turn_marker(input_processor, settings)
        )
    admission: Admission | None = processor["himap_admission"]
    return admission


def _other_modality(request: EngineCoreRequest) -> str | None:
    """The first modality of a prompt that is never pruned."""
    modalities = (feature.modality for feature in request.mm_features or ())
    return next((modality for modality in modalities if modality not in _PRUNABLE), None)
