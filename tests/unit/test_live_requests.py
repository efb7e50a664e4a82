# SPDX-License-Identifier: Apache-2.0
"""Which requests the worker counts, from vLLM's own request data."""

from __future__ import annotations

from collections import Counter

import pytest
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import NewRequestData

from himap_vllm.criteria.himap import HIMAP
from himap_vllm.pruning.live_requests import LiveRequests
from himap_vllm.pruning.stats import PruningStats


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
    features = [
        MultiModalFeatureSpec(None, modality, f"{i}", PlaceholderRange(offset=20 * i, length=10))
        for i, modality in enumerate(modalities)
    ]
    stats = PruningStats()
    LiveRequests((HIMAP, HIMAP), stats).on_request(
        NewRequestData(
            req_id="id",
            prompt_token_ids=list(range(100)),
            mm_features=features,
            sampling_params=SamplingParams(),
            pooling_params=None,
            block_ids=([0],),
            num_computed_tokens=0,
            lora_request=None,
        )
    )
    assert stats.requests == Counter(counted)
