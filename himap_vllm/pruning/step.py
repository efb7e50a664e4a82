# SPDX-License-Identifier: Apache-2.0
"""The state that a step's two cuts share, from scoring to the last gather.

One `PruningContext` per model instance connects the model runner, which lays out the step, the
attention layers before the cuts, which score, and the decoder, which gathers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.triton_utils import HAS_TRITON

from himap_vllm.config import EngineSettings
from himap_vllm.criteria import CRITERIA
from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.himap import HIMAP
from himap_vllm.kernels.importance import VoteTiles
from himap_vllm.kernels.importance import importance as importance_in_one_launch
from himap_vllm.kernels.upload import upload
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step import Cut, IntArray, StageBatch, StepPlan
from himap_vllm.pruning.importance import importance
from himap_vllm.pruning.live_requests import Recorder
from himap_vllm.pruning.selection import SurvivorCounts, compact, surviving_rows
from himap_vllm.pruning.stage_metadata import StageView

CachedKeys = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(row in the batch [n], KV position [n]) -> keys [n, num_kv_heads, head_size]."""


class _DeviceCut:
    """One cut's arrays on the device."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._tiles = VoteTiles.of(cut)
        self.num_partials = self._tiles.num_partials
        self.counts: SurvivorCounts
        self.tiles: torch.Tensor
        self.rows: torch.Tensor | None

    def arrays(self) -> list[IntArray]:
        """What `take` wants on the device."""
        rows = self._tiles.rows
        return [
            self.cut.padded,
            self.cut.keep,
            self.cut.protected,
            self._tiles.tiles,
            np.empty(0, dtype=np.int64) if rows is None else rows,
        ]

    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Receive `arrays` as tensors."""
        padded, keep, protected, self.tiles, rows = tensors
        self.counts = SurvivorCounts(padded, keep, protected, self.cut.num_tokens)
        self.rows = None if self._tiles.rows is None else rows


class PruningStep:
    """One step that prunes a prompt.

    Everything that the cuts need from the host goes to the device here, in one copy; from then on
    no operation waits for the device, and none is repeated per prompt.

    Attributes:
        plan: batch and cuts.
        captured: [NUM_STAGES] tokens of the captured graphs that a later stage replays, its own and
            padding; None: it runs without graphs.
        rows: what went on at each cut so far: rows of the step before it, ascending.
        seconds: host time spent on pruning so far.
    """

    def __init__(
        self,
        plan: StepPlan,
        device: torch.device,
        criterion: Criterion = HIMAP,
        captured: Sequence[int | None] = (None,) * NUM_STAGES,
    ) -> None:
        assert plan.cuts is not None
        cuts = plan.cuts if criterion.select_voters is None else criterion.select_voters(plan.cuts)
        first = cuts[0]
        assert first.image_tokens is not None
        began = time.perf_counter()
        self.plan = plan
        self.captured = captured
        self.rows: list[torch.Tensor] = []
        self._scores: torch.Tensor | None = None
        self._criterion = criterion
        self._cuts = [_DeviceCut(cut) for cut in cuts]
        num_cached = [request.num_cached for request in first.requests]
        arrays = [
            first.image_tokens,
            np.repeat([request.request for request in first.requests], num_cached),
            np.concatenate([np.arange(n) for n in num_cached]),
        ]
        of_cuts = [cut.arrays() for cut in self._cuts]
        tensors = iter(upload([*arrays, *of_cuts[0], *of_cuts[1]], device))
        self._image_tokens, *self._cached = itertools.islice(tensors, len(arrays))
        for cut, own in zip(self._cuts, of_cuts, strict=True):
            cut.take(list(itertools.islice(tensors, len(own))))
        self.seconds = time.perf_counter() - began

    def score(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        cached_keys: CachedKeys,
    ) -> torch.Tensor:
        """Importance at cut `index`, from the layer before it; see `importance`.

        What the prompts have in the KV cache precedes their first image: it is the same in every
        stage.
        """
        began = time.perf_counter()
        cut = self._cuts[index]
        cached = cached_keys(*self._cached) if len(self._cached[0]) else key[:0]
        if HAS_TRITON:
            rows = self._image_tokens if cut.rows is None else cut.rows
            scores = importance_in_one_launch(
                query, key, cached, scale, cut.tiles, rows, cut.num_partials, self._image_tokens
            )
        else:
            scores = importance(query, key, cached, scale, cut.cut, self._image_tokens)
        self.seconds += time.perf_counter() - began
        return scores

    def set_scores(self, scores: torch.Tensor) -> None:
        """Hand the scores, summed over all heads of the model, to the next `cut`."""
        self._scores = scores

    def cut(self, index: int, *stream: torch.Tensor) -> torch.Tensor:
        """Rows that survive cut `index`, among the step's rows before it.

        Args:
            index: 0 or 1.
            stream: [num_tokens, hidden_size] each; their sum is the residual stream at the cut.
        """
        began = time.perf_counter()
        num_tokens = self.plan.stages[index].num_tokens
        cut = self._cuts[index]
        scores = self._criterion.score(self._candidates(index, stream))
        if self._criterion.needs_hidden_states:
            # States may differ in rounding from rank to rank; all must choose the same tokens.
            scores = get_tp_group().broadcast(scores)
        rows = surviving_rows(scores, self._image_tokens, num_tokens, cut.counts)
        self._scores = None
        image_token = torch.zeros(num_tokens, dtype=torch.bool, device=rows.device)
        image_token.index_fill_(0, self._image_tokens, True)
        self._image_tokens = compact(image_token[rows], int(cut.cut.keep.sum()))
        self.rows.append(rows)
        self.seconds += time.perf_counter() - began
        return rows

    def _candidates(self, index: int, stream: Sequence[torch.Tensor]) -> Candidates:
        criterion = self._criterion
        if criterion.select_voters is not None:
            assert self._scores is not None, "the layer before the cut has not run"
        states = None
        if criterion.needs_hidden_states:
            own = [part.index_select(0, self._image_tokens).float() for part in stream]
            states = torch.stack(own).sum(0)
        return Candidates(
            cut=self._cuts[index].cut,
            index=index,
            device=self._image_tokens.device,
            attention=self._scores,
            states=states,
        )


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass
class PruningContext:
    """Per model instance.

    Attributes:
        settings: the engine's.
        heads: of the decoder's attention, on this rank.
        recorder: plans of live requests, counters, traces.
        step: the running step, if it prunes a prompt.
        enter_stage: called with the batch of each later stage of a step that prunes, before its
            layers run. None without LoRA.
        views: [NUM_STAGES] the running step as each stage sees it. None, for one stage or for all:
            as vLLM does, which is so in the first stage, and where no request has a plan.
    """

    settings: EngineSettings
    heads: Heads
    recorder: Recorder
    step: PruningStep | None = None
    enter_stage: Callable[[StageBatch], None] | None = None
    views: Sequence[StageView | None] | None = None

    @property
    def criterion(self) -> Criterion:
        """The engine's."""
        return CRITERIA[self.settings.criterion]
