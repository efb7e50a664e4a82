# SPDX-License-Identifier: Apache-2.0
"""Which requests the worker counts, from vLLM's own request data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import NewRequestData

from himap_vllm.criteria.himap import HIMAP
from himap_vllm.plan.prompt import Ratios
from himap_vllm.plan.requests import Decision, stamp
from himap_vllm.pruning.live_requests import LiveRequests
from himap_vllm.pruning.stats import PruningStats


def arrived(
    modalities: Sequence[str], params: SamplingParams, num_computed: int = 0
) -> NewRequestData:
    """A request with an item of 10 tokens at 0, 20, 40 and so on."""
    features = [
        MultiModalFeatureSpec(None, modality, f"{i}", PlaceholderRange(offset=20 * i, length=10))
        for i, modality in enumerate(modalities)
    ]
    return NewRequestData(
        req_id="id",
        prompt_token_ids=list(range(100)),
        mm_features=features,
        sampling_params=params,
        pooling_params=None,
        block_ids=([0],),
        num_computed_tokens=num_computed,
        lora_request=None,
    )


@pytest.mark.parametrize(
    ("modalities", "counted"),
    [
        ((), {}),
        (("prompt_embeds",), {}),  # text
        (("image",), {"unpruned": 1}),
        (("prompt_embeds", "image"), {"unpruned": 1}),
    ],
)
def test_prompts_with_images_are_counted(
    modalities: tuple[str, ...], counted: dict[str, int]
) -> None:
    stats = PruningStats()
    LiveRequests((HIMAP, HIMAP), stats).on_request(arrived(modalities, SamplingParams()))
    assert stats.requests == Counter(counted)
    assert stats.image_tokens_unpruned == 10 * modalities.count("image")


WHOLE, HALF = Ratios(0, 0), Ratios(0.5, 0)


@pytest.mark.parametrize(
    ("ends", "found", "outcome", "tokens"),
    [
        # Three images of 10 tokens, the second of which stays whole: pruned, reused, unpruned.
        ((), 0, None, (20, 0, 10)),
        ((), 49, None, (20, 0, 10)),
        ((), 99, "reused", (0, 30, 0)),
        ((20, 40, 60), 0, None, (20, 0, 10)),
        ((20, 40, 60), 20, None, (10, 10, 10)),
        ((20, 40, 60), 99, "reused", (0, 20, 10)),
        ((20, 60, 60), 20, None, (10, 10, 10)),
        ((20, 60, 60), 99, "reused", (0, 30, 0)),
    ],
)
def test_image_tokens_are_counted_by_outcome(
    ends: tuple[int, ...], found: int, outcome: str | None, tokens: tuple[int, int, int]
) -> None:
    """Once, although a preempted request of Model Runner V2 arrives twice."""
    params = SamplingParams()
    stamp(params, Decision("pruned", (HALF, WHOLE, HALF), ends))
    stats = PruningStats()
    requests = LiveRequests((HIMAP, HIMAP), stats)
    for _ in range(2):
        requests.on_request(arrived(("image",) * 3, params, found))
    assert stats.requests == Counter([] if outcome is None else [outcome])
    counted = (stats.image_tokens_pruned, stats.image_tokens_reused, stats.image_tokens_unpruned)
    assert counted == tokens
