# SPDX-License-Identifier: Apache-2.0
"""What admission decides on a request, from vLLM's own request data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.engine import EngineCoreRequest

from himap_vllm.config import EngineSettings, HiMAPError
from himap_vllm.frontend.admission import Admission
from himap_vllm.plan.prompt import Ratios
from himap_vllm.plan.requests import Decision, plan_of, read_stamp

ASKED = {"himap_shallow_ratio": 0.5, "himap_deep_ratio": 0.5}

# vLLM's sampling parameters that read every row of the prompt, with a value.
WHOLE_PROMPT: dict[str, Any] = {
    "prompt_logprobs": 1,
    "prompt_logprob_token_ids": np.array([[1, 2]]),
}
# Those that mean nothing without the ones above.
WITH_THEM = {"prompt_logprob_start", "flat_logprobs"}
# Refused at start-up with the feature they belong to (`enable_return_routed_experts`).
WITH_A_FEATURE = {"routed_experts_prompt_start"}
# Those that shape only what is generated, or read the prompt as token ids.
GENERATION = {
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
    "watermarking", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "max_tokens", "min_tokens", "logprobs", "logprob_token_ids", "detokenize",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "_eos_token_id",
    "_all_stop_token_ids", "_watermarking_skipped", "structured_outputs", "logit_bias",
    "allowed_token_ids", "extra_args", "bad_words", "_bad_words_token_ids",
    "skip_reading_prefix_cache", "thinking_token_budget", "repetition_detection",
    "trace_decode_token_ids",
}  # fmt: skip


def feature(modality: str, offset: int, length: int) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(None, modality, f"{modality} {offset}", place)


def admit(
    params: SamplingParams,
    *features: MultiModalFeatureSpec,
    steps: int = 512,
    settings: EngineSettings | None = None,
    marker: tuple[int, ...] = (),
) -> Any:
    """Admit a prompt of the tokens 0 to 99; the request as it goes to the engine core."""
    request = EngineCoreRequest(
        "id", list(range(100)), list(features), params, None, 0.0, None, None, None
    )
    scheduler = SchedulerConfig.default_factory(
        max_num_batched_tokens=steps, max_num_seqs=8, max_model_len=512
    )
    Admission(settings or EngineSettings(), scheduler, marker).admit(request)
    return request


def test_each_sampling_parameter_of_vllm_was_decided_on() -> None:
    """A new one: does it read rows of the prompt that pruning drops? Then admission refuses it."""
    decided = set(WHOLE_PROMPT) | WITH_THEM | WITH_A_FEATURE | GENERATION
    assert set(SamplingParams.__struct_fields__) == decided


@pytest.mark.parametrize("name", WHOLE_PROMPT)
def test_what_reads_every_row_excludes_pruning(name: str) -> None:
    value = {name: WHOLE_PROMPT[name]}
    image = feature("image", 10, 40)
    with pytest.raises(HiMAPError, match=f"^{name} can't be combined with pruning") as error:
        admit(SamplingParams(**value, extra_args=ASKED), image)
    assert error.value.parameter == name
    request = admit(SamplingParams(**value), image)  # only the server's default asks for pruning
    assert read_stamp(request.sampling_params) == Decision("bypassed_prompt_logprobs")
    assert read_stamp(admit(SamplingParams(**value, extra_args=ASKED)).sampling_params) == (
        Decision()
    )  # no image, no conflict


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("with_image", [True, False])
def test_modalities_that_are_not_pruned(modality: str, with_image: bool) -> None:
    features = [feature("image", 10, 40)] * with_image + [feature(modality, 60, 20)]
    with pytest.raises(HiMAPError, match=f"prompts with {modality} are not pruned"):
        admit(SamplingParams(extra_args=ASKED), *features)
    request = admit(SamplingParams(), *features)
    assert read_stamp(request.sampling_params) == Decision(f"bypassed_{modality}")


def test_prompt_embeds_are_text() -> None:
    """vLLM calls them a modality; as rows of the prompt they vote, and none is dropped."""
    request = admit(SamplingParams(extra_args=ASKED), feature("image", 10, 40),
                    feature("prompt_embeds", 60, 20))  # fmt: skip
    assert read_stamp(request.sampling_params) == Decision("pruned", (Ratios(0.5, 0.5),))
    plan = plan_of(100, request.mm_features, request.sampling_params)
    assert plan is not None
    assert [image.runs for image in plan.images] == [((10, 50),)]
    alone = admit(SamplingParams(extra_args=ASKED), feature("prompt_embeds", 60, 20))
    assert read_stamp(alone.sampling_params) == Decision()


def test_each_image_has_its_ratios() -> None:
    """In the order of the prompt, whatever the order of the features; one may have no tokens."""
    empty = MultiModalFeatureSpec(
        None, "image", "empty", PlaceholderRange(55, 3, is_embed=torch.zeros(3, dtype=torch.bool))
    )
    args = {"himap_shallow_ratio": [0, 0.9, 0.5], "himap_deep_ratio": [0, 0.9, 0.75]}
    features = [feature("image", 60, 20), empty, feature("image", 10, 40)]
    request = admit(SamplingParams(extra_args=args), *features)
    assert read_stamp(request.sampling_params) == Decision(
        "pruned", (Ratios(0, 0), Ratios(0.9, 0.9), Ratios(0.5, 0.75))
    )
    plan = plan_of(100, request.mm_features, request.sampling_params)
    assert plan is not None
    assert plan.counts == ((40, 40, 40), (20, 10, 3))
    with pytest.raises(HiMAPError, match="a list of 2, one for each image of the prompt; got"):
        admit(SamplingParams(extra_args=args), *features[:2])


def test_if_possible_is_never_refused() -> None:
    args = {**ASKED, "himap_if_possible": True}
    image = feature("image", 10, 40)
    request = admit(SamplingParams(extra_args=args, prompt_logprobs=1), image)
    assert read_stamp(request.sampling_params) == Decision("bypassed_prompt_logprobs")
    request = admit(SamplingParams(extra_args=args), image)
    assert read_stamp(request.sampling_params).outcome == "pruned"


def test_the_stamp_is_the_only_argument_left_and_the_callers_stay() -> None:
    args = {**ASKED, "other": 1}
    params = SamplingParams(extra_args=args)
    request = admit(params, feature("image", 10, 40))
    assert args == {**ASKED, "other": 1}
    assert set(request.sampling_params.extra_args) == {"other", "himap_admission"}
    with pytest.raises(HiMAPError, match="unknown parameter 'himap_admission'"):
        admit(request.sampling_params, feature("image", 10, 40))


IMAGES = (feature("image", 10, 10), feature("image", 30, 10), feature("image", 60, 10))


@pytest.mark.parametrize(
    ("settings", "votes", "ends"),
    [
        (EngineSettings(), None, (47, 47, 100)),
        (EngineSettings(), "turn", (47, 47, 100)),
        (EngineSettings(), "all", ()),
        (EngineSettings(votes="all"), None, ()),
        (EngineSettings(votes="all"), "turn", (47, 47, 100)),
        (EngineSettings(criterion="uniform"), None, (20, 40, 70)),
        (EngineSettings(criterion="random+diversity"), "all", (20, 40, 70)),
        (EngineSettings(criterion="uniform+fastv"), None, (47, 47, 100)),
    ],
)
def test_ends_travel_with_the_request(
    settings: EngineSettings, votes: str | None, ends: tuple[int, ...]
) -> None:
    args = ASKED if votes is None else {**ASKED, "himap_votes": votes}
    params = SamplingParams(extra_args=args)
    request = admit(params, *IMAGES, settings=settings, marker=(45, 46))
    assert read_stamp(request.sampling_params).ends == ends
    plan = plan_of(100, request.mm_features, request.sampling_params)
    assert plan is not None
    expected = dict.fromkeys(ends) if ends else {100: None}
    assert [unit.end for unit in plan.units] == [*expected]


def test_the_longest_unit_must_fit_a_step() -> None:
    args = {**ASKED, "himap_votes": "all"}
    admit(SamplingParams(extra_args=ASKED), *IMAGES, steps=40, marker=(45, 46))
    with pytest.raises(HiMAPError, match="90 tokens from an image to the end of the prompt"):
        admit(SamplingParams(extra_args=args), *IMAGES, steps=40, marker=(45, 46))
    with pytest.raises(HiMAPError, match="40 tokens from an image to the end of its turn"):
        admit(SamplingParams(extra_args=ASKED), *IMAGES, steps=39, marker=(45, 46))


@pytest.mark.parametrize("votes", ["last", "", None, 1, ["turn"], "Turn"])
def test_votes_of_another_name_are_refused(votes: object) -> None:
    message = "^himap_votes must be one of turn, all, got"
    with pytest.raises(HiMAPError, match=message) as error:
        admit(SamplingParams(extra_args={"himap_votes": votes}))
    assert error.value.parameter == "himap_votes"
