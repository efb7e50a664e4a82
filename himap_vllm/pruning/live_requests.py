# SPDX-License-Identifier: Apache-2.0
"""The requests that a worker holds: their plans, and which of them are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from himap_vllm.criteria.criterion import Criteria
from himap_vllm.criteria.random import prompt_seed
from himap_vllm.plan.requests import PROMPT_EMBEDS, image_tokens, plan_of, read_stamp
from himap_vllm.plan.table import ActivePlans

if TYPE_CHECKING:
    from himap_vllm.pruning.kv_groups import StageGroups
    from himap_vllm.pruning.stats import PruningStats


class LiveRequests:
    """The live requests of a model instance. Worker and model runner report what happens.

    Attributes:
        plans: of live requests.
    """

    def __init__(self, criteria: Criteria, stats: PruningStats) -> None:
        self.plans = ActivePlans()
        self._seeded = any(criterion.seeded for criterion in criteria)
        self._stats = stats
        self._counted: set[str] = set()  # live requests that are in `stats.requests`
        self._arrived: set[str] = set()  # live requests with a plan

    def on_request(self, request: Any) -> None:
        """Note a request that has arrived (vLLM's `NewRequestData`).

        In Model Runner V2 a preempted request arrives again. In both runners the next chunk of a
        streaming-input session arrives under the same id. Such a request is counted already.
        """
        if all(feature.modality == PROMPT_EMBEDS for feature in request.mm_features):
            return  # text only
        plan = plan_of(len(request.prompt_token_ids), request.mm_features, request.sampling_params)
        if plan is not None:
            if self._seeded:
                tokens = np.asarray(request.prompt_token_ids, dtype="<i8")
                seeds = tuple(prompt_seed(tokens[: unit.end]) for unit in plan.units)
                plan = replace(plan, seeds=seeds)
            self.plans.discard(request.req_id)
            self.plans.add(request.req_id, plan)
            if request.req_id not in self._arrived:
                self._arrived.add(request.req_id)
                if self._stats.count_images(plan, request.num_computed_tokens):
                    self._counted.add(request.req_id)
        elif request.req_id not in self._counted:
            self._counted.add(request.req_id)
            outcome = read_stamp(request.sampling_params).outcome
            images = image_tokens(request.mm_features)
            self._stats.count_unpruned(outcome, sum(image.count for image in images))

    def on_pruned(
        self, request_id: str, num_tokens: int, blocks: Sequence[int], groups: StageGroups
    ) -> None:
        """Note a prompt that is pruned in the running step.

        Args:
            request_id: its id.
            num_tokens: of the sequence, after the step.
            blocks: [num_groups] blocks that it holds in each KV cache group.
            groups: these groups.
        """
        if request_id in self._counted:
            self._stats.count_recomputed()
            return
        self._counted.add(request_id)
        self._stats.count_prompt(self.plans[request_id])
        self._stats.count_blocks(blocks, groups.num_blocks(num_tokens), groups.bytes_per_block)

    def on_finished(self, request_id: str) -> None:
        """Note a request that has ended."""
        self.plans.discard(request_id)
        self._counted.discard(request_id)
        self._arrived.discard(request_id)
