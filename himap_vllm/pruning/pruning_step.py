# SPDX-License-Identifier: Apache-2.0
"""One step that prunes a prompt: its cuts, with everything they need on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from himap_vllm.criteria.criterion import Criteria, with_voters
from himap_vllm.criteria.himap import HIMAP
from himap_vllm.kernels.importance import VoteTiles
from himap_vllm.kernels.upload import upload
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step_layout import StepPlan
from himap_vllm.pruning.cut import CutTensors, PruningCut
from himap_vllm.pruning.prior import PriorTable


class PruningStep:
    """Copy everything that the cuts need from the host to the device, in one copy.

    After that no operation waits for the device, and none is repeated per prompt.

    Attributes:
        plan: the step's batches and cuts, on the host.
        graph_sizes: [NUM_STAGES] tokens of the captured graphs that a later stage replays, its own
            and padding; None: it runs without graphs.
        cuts: the first and the second.
    """

    def __init__(
        self,
        plan: StepPlan,
        device: torch.device,
        criteria: Criteria = (HIMAP, HIMAP),
        graph_sizes: Sequence[int | None] = (None,) * NUM_STAGES,
        prior: PriorTable | None = None,
    ) -> None:
        assert plan.cuts is not None
        cuts = with_voters(plan.cuts, criteria)
        first = cuts[0]
        assert first.image_tokens is not None
        began = time.perf_counter()
        self.plan = plan
        self.graph_sizes = graph_sizes
        tiles = [VoteTiles.of(cut) for cut in cuts]
        arrays = [first.image_tokens]
        for cut, work in zip(cuts, tiles, strict=True):
            arrays += CutTensors.arrays(cut, work)
        tensors = iter(upload(arrays, device))
        image_tokens = next(tensors)
        self.cuts = tuple(
            PruningCut(
                index,
                cut,
                plan.stages[index].num_tokens,
                CutTensors.take(work, tensors),
                criteria[index],
            )
            for index, (cut, work) in enumerate(zip(cuts, tiles, strict=True))
        )
        self.cuts[0].image_tokens = image_tokens
        self._deep_prior: torch.Tensor | None = None
        if prior is not None:
            counts = [
                vote.tokens.stop - vote.tokens.start for unit in first.units for vote in unit.votes
            ]
            self.cuts[0].prior, self._deep_prior = prior.of(counts, device)
        self._built_seconds = time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Host time spent on pruning so far."""
        return self._built_seconds + sum(cut.seconds for cut in self.cuts)

    def cut(self, index: int, *stream: torch.Tensor) -> torch.Tensor:
        """Rows that survive cut `index`; see `PruningCut.choose`."""
        rows = self.cuts[index].choose(*stream)
        if index == 0:
            left = self.cuts[0].image_tokens_left()
            self.cuts[1].image_tokens = left
            if self._deep_prior is not None:
                self.cuts[1].prior = self.cuts[0].values_left(self._deep_prior, left)
        return rows
