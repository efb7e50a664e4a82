# SPDX-License-Identifier: Apache-2.0
"""The state that the parts of a pruning model share.

One `PruningContext` per model instance connects the model runner, which plans the step, the
attention layers before the cuts, which score, and the decoder, which gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from himap_vllm.config import EngineSettings
from himap_vllm.criteria.criterion import Criteria
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step_layout import StageBatch, StepPlan
from himap_vllm.pruning.live_requests import LiveRequests
from himap_vllm.pruning.prior import PriorTable
from himap_vllm.pruning.pruning_step import PruningStep
from himap_vllm.pruning.request_traces import RequestTraces
from himap_vllm.pruning.stage_metadata import StageAttentionMetadata
from himap_vllm.pruning.stats import PruningStats
from himap_vllm.pruning.trace_log import TraceLog


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass
class PruningContext:
    """The shared state of one model instance.

    Attributes:
        settings: the engine's.
        heads: of the decoder's attention, on this rank.
        criteria: of both cuts.
        prior: the positional prior, if a criterion needs it.
        stats: the counters.
        requests: live requests and their plans.
        traces: what survived of the latest pruned prompts.
        request_traces: what survived of the prompts of requests that asked for it.
        step: the running step, if it prunes a prompt.
        stage_metadata: [NUM_STAGES] the running step as each stage sees it. A stage has None if it
            sees the step as vLLM does: the first stage always, and all if no request has a plan.
        enter_stage: called with the batch of each later stage of a step that prunes, before its
            layers run. None without LoRA.
    """

    settings: EngineSettings
    heads: Heads
    criteria: Criteria
    prior: PriorTable | None = None
    stats: PruningStats = field(init=False)
    requests: LiveRequests = field(init=False)
    traces: TraceLog = field(init=False)
    request_traces: RequestTraces = field(init=False)
    step: PruningStep | None = None
    stage_metadata: Sequence[StageAttentionMetadata | None] | None = None
    enter_stage: Callable[[StageBatch], None] | None = None

    def __post_init__(self) -> None:
        self.stats = PruningStats()
        self.requests = LiveRequests(self.criteria, self.stats)
        self.traces = TraceLog(self.settings.trace_requests)
        self.request_traces = RequestTraces()

    def begin_step(
        self,
        plan: StepPlan,
        device: torch.device,
        later: Sequence[StageAttentionMetadata],
        graph_sizes: Sequence[int | None] = (None,) * NUM_STAGES,
    ) -> None:
        """Begin a step in which a request has a plan.

        Args:
            plan: of the step.
            device: of the model.
            later: [NUM_STAGES - 1] metadata of the later stages.
            graph_sizes: as `PruningStep` has them.
        """
        self.stage_metadata = [None, *later]
        if plan.prunes:
            self.step = PruningStep(plan, device, self.criteria, graph_sizes, self.prior)

    def end_step(self) -> None:
        """Forget the running step."""
        self.step = self.stage_metadata = None
