# SPDX-License-Identifier: Apache-2.0
"""The state that a step's two cuts share, from scoring to the last gather.

One `PruningState` per model instance connects the model runner, which lays out the step, the
attention layers before the cuts, which score, and the decoder, which gathers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from himap_vllm.config import EngineSettings
from himap_vllm.importance import CachedKeys, importance
from himap_vllm.layout import Cut, StepLayout
from himap_vllm.selection import compact, surviving_rows
from himap_vllm.stats import PruningStats


class ActiveStep:
    """One step that holds planned requests, pruned in this step or earlier.

    Attributes:
        layout: geometry and cuts.
        rows: what went on at each cut so far: rows of the step before it, ascending.
        seconds: host time spent on pruning so far.
    """

    def __init__(self, layout: StepLayout, device: torch.device) -> None:
        self.layout = layout
        self.rows: list[torch.Tensor] = []
        self.seconds = 0.0
        self._scores: torch.Tensor | None = None
        if layout.cuts is not None:
            first = layout.cuts[0]
            assert first.image_tokens is not None
            self._image_tokens = torch.from_numpy(first.image_tokens).to(device)

    @property
    def prunes(self) -> bool:
        """Whether a prompt is pruned in this very step."""
        return self.layout.cuts is not None

    def _cut(self, index: int) -> Cut:
        assert self.layout.cuts is not None
        return self.layout.cuts[index]

    def score(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        cached_keys: CachedKeys,
    ) -> torch.Tensor:
        """Importance at cut `index`, from the layer before it; see `importance`."""
        began = time.perf_counter()
        scores = importance(query, key, scale, self._cut(index), self._image_tokens, cached_keys)
        self.seconds += time.perf_counter() - began
        return scores

    def set_scores(self, scores: torch.Tensor) -> None:
        """Hand the scores, summed over all heads of the model, to the next `cut`."""
        self._scores = scores

    def cut(self, index: int, num_tokens: int) -> torch.Tensor:
        """Rows that survive cut `index` of a step with `num_tokens` rows before it."""
        began = time.perf_counter()
        cut = self._cut(index)
        assert self._scores is not None, "the layer before the cut has not run"
        rows = surviving_rows(self._scores, self._image_tokens, num_tokens, cut)
        self._scores = None
        image_token = torch.zeros(num_tokens, dtype=torch.bool, device=rows.device)
        image_token[self._image_tokens] = True
        self._image_tokens = compact(image_token[rows], int(cut.keep.sum()))
        self.rows.append(rows)
        self.seconds += time.perf_counter() - began
        return rows


@dataclass
class PruningState:
    """Per model instance; `step` is None unless a planned request is in the running step."""

    settings: EngineSettings
    stats: PruningStats = field(default_factory=PruningStats)
    step: ActiveStep | None = None
