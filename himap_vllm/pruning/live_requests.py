# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers of requests: plans, counters, traces. Both model runners feed it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from himap_vllm.config import EngineSettings
from himap_vllm.core.kv_cache import bytes_per_block, group_stages
from himap_vllm.criteria import CRITERIA
from himap_vllm.criteria.random import prompt_seed
from himap_vllm.plan.prompt import PromptPlan
from himap_vllm.plan.requests import plan_of, read_stamp, stage_layers
from himap_vllm.plan.table import ActivePlans
from himap_vllm.pruning.stats import PruningStats

if TYPE_CHECKING:
    from himap_vllm.pruning.step import PruningStep

Trace = dict[str, list[list[int]]]


class Recorder:
    """Per model instance.

    Attributes:
        stats: the counters.
        plans: of live requests.
        traces: surviving prompt positions per image of the latest `trace_requests` pruned prompts:
            {"shallow": [[...], ...], "deep": [[...], ...]}.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.stats = PruningStats()
        self.plans = ActivePlans()
        self.traces: OrderedDict[str, Trace] = OrderedDict()
        self._settings = settings
        self._counted: set[str] = set()  # live requests that are in `stats.requests`
        self._group_stages: list[int] = []
        self._bytes_per_block = 0

    def see_groups(self, kv_cache_config: Any, model_config: Any) -> None:
        """Learn the KV cache groups.

        Raises:
            RuntimeError: they are not those that the plan of the layers demands.
        """
        layers = stage_layers(self._settings, model_config)
        self._group_stages = group_stages(kv_cache_config, layers)
        self._bytes_per_block = bytes_per_block(kv_cache_config)

    @property
    def group_stages(self) -> list[int]:
        """Stage of each KV cache group."""
        return self._group_stages

    def see_request(self, request: Any) -> None:
        """Take in a request on its arrival (vLLM's `NewRequestData`).

        Model Runner V2 sees a preempted request arrive again, and both see the next chunk of a
        streaming-input session under the same id: such a request is counted already.
        """
        if not request.mm_features:
            return
        plan = plan_of(len(request.prompt_token_ids), request.mm_features, request.sampling_params)
        if plan is not None:
            if CRITERIA[self._settings.criterion].seeded:
                plan = replace(plan, seed=prompt_seed(request.prompt_token_ids))
            self.plans.discard(request.req_id)
            self.plans.add(request.req_id, plan)
        elif request.req_id not in self._counted:
            self._counted.add(request.req_id)
            self.stats.requests[read_stamp(request.sampling_params).outcome] += 1

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.plans.discard(request_id)
        self._counted.discard(request_id)

    def see_pruned(self, request_id: str, plan: PromptPlan, blocks: Sequence[int]) -> None:
        """Count a prompt that is pruned in the running step.

        Args:
            request_id: its id.
            plan: its plan.
            blocks: [num_groups] blocks that it holds in each KV cache group.
        """
        stats = self.stats
        if request_id in self._counted:
            stats.recomputed += 1
            return
        self._counted.add(request_id)
        seen, shallow, deep = (sum(column) for column in zip(*plan.counts, strict=True))
        stats.requests["pruned"] += 1
        stats.image_tokens += seen
        stats.image_tokens_kept_shallow += shallow
        stats.image_tokens_kept_deep += deep
        stats.count_blocks(blocks, self._group_stages, self._bytes_per_block)

    def see_step_end(self, step: PruningStep, request_ids: Sequence[str]) -> None:
        """Count a step that pruned, after its forward pass; `request_ids` in batch order."""
        assert step.plan.cuts is not None
        self.stats.count_step(step.seconds)
        if self._settings.trace_requests:
            for pruned in step.plan.cuts[0].requests:
                self._trace(request_ids[pruned.request], step, pruned.request)

    def _trace(self, request_id: str, step: PruningStep, row: int) -> None:
        """Remember where the surviving image tokens of one prompt stood in it."""
        plan = self.plans[request_id]
        first, second = step.rows
        batch = step.plan.stages[0]
        begin = batch.query_start_loc[row]
        offset = int(batch.seq_lens[row] - batch.query_start_loc[row + 1])
        trace: Trace = {}
        with gpu_sync_allowed():
            kept = {"shallow": first.tolist(), "deep": first[second].tolist()}
        for name, rows in kept.items():
            alive = {row + offset for row in rows if row >= begin}
            trace[name] = [
                [p for run in image.runs for p in range(*run) if p in alive]
                for image in plan.images
            ]
        self.traces[request_id] = trace
        while len(self.traces) > self._settings.trace_requests:
            self.traces.popitem(last=False)
