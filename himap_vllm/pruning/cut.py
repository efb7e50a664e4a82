# SPDX-License-Identifier: Apache-2.0
"""One cut of a running step. The layer before the cut calls `score`, the decoder calls `choose`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_gather,
)
from vllm.triton_utils import HAS_TRITON

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.kernels.importance import VoteTiles
from himap_vllm.kernels.importance import importance as importance_on_gpu
from himap_vllm.plan.step_layout import Cut
from himap_vllm.plan.voters import IntArray
from himap_vllm.pruning.importance import CachedKeys, importance
from himap_vllm.pruning.selection import compact, surviving_rows


@dataclass(frozen=True, slots=True)
class CutTensors:
    """A cut's arrays on the device; `Cut` and `VoteTiles` name the index spaces.

    Attributes:
        padded: [num_images, longest image] int64.
        keep: [num_images] int64.
        protected: int64.
        of_rows: [num_tiles, 5] int64, of rows that vote.
        of_columns: [num_tiles, 5] int64, of image tokens.
        voters: [num rows] int64, rows of the step; None: the image tokens themselves vote.
    """

    padded: torch.Tensor
    keep: torch.Tensor
    protected: torch.Tensor
    of_rows: torch.Tensor
    of_columns: torch.Tensor
    voters: torch.Tensor | None

    @staticmethod
    def arrays(cut: Cut, tiles: VoteTiles) -> list[IntArray]:
        """Return the host arrays that `take` needs on the device."""
        voters = np.empty(0, dtype=np.int64) if tiles.rows is None else tiles.rows
        return [cut.padded, cut.keep, cut.protected, tiles.of_rows, tiles.of_columns, voters]

    @classmethod
    def take(cls, tiles: VoteTiles, tensors: Iterator[torch.Tensor]) -> CutTensors:
        """Take the next tensors of `tensors`, in the order of `arrays`."""
        padded, keep, protected, of_rows, of_columns, voters = islice(tensors, 6)
        return cls(
            padded=padded,
            keep=keep,
            protected=protected,
            of_rows=of_rows,
            of_columns=of_columns,
            voters=None if tiles.rows is None else voters,
        )


class PruningCut:
    """One cut of a step that prunes, and the scores that decide it.

    Attributes:
        image_tokens: [num flat images] rows of the image tokens, in the step before the cut. Those
            of the second cut are known once the first has chosen.
        attention: [num flat images] as `Candidates` has it; known once the layer before has run.
        prior: [num flat images] as `Candidates` has it.
        survivors: rows that go on, in the step before the cut, ascending; known once it has chosen.
        scores: [num flat images] by which it chose; known once it has chosen.
        seconds: host time spent here so far.
    """

    image_tokens: torch.Tensor
    survivors: torch.Tensor
    scores: torch.Tensor

    def __init__(
        self,
        index: int,
        cut: Cut,
        num_tokens: int,
        tensors: CutTensors,
        criterion: Criterion,
    ) -> None:
        """
        Args:
            index: 0 or 1.
            cut: the step's.
            num_tokens: rows of the step before the cut.
            tensors: of `cut`.
            criterion: of this cut.
        """
        self.cut = cut
        self.tensors = tensors
        self.prior: torch.Tensor | None = None
        self.seconds = 0.0
        self._index = index
        self._num_tokens = num_tokens
        self._criterion = criterion
        self.attention: torch.Tensor | None = None

    def score(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, cached_keys: CachedKeys
    ) -> None:
        """Compute the importance of each image token in the layer before the cut, and keep it.

        Args:
            query: [num_tokens, num_heads, head_size] of that layer, on this rank.
            key: [num_tokens, num_kv_heads, head_size], likewise.
            scale: softmax scale.
            cached_keys: finds keys of that layer in the KV cache.
        """
        began = time.perf_counter()
        tensors = self.tensors
        if HAS_TRITON:
            voters = self.image_tokens if tensors.voters is None else tensors.voters
            longest = max(unit.num_cached for unit in self.cut.units)
            scores = importance_on_gpu(
                query,
                key,
                cached_keys(slice(None), longest),
                scale,
                tensors.of_rows,
                tensors.of_columns,
                voters,
                self.image_tokens,
            )
        else:
            scores = importance(query, key, cached_keys, scale, self.cut, self.image_tokens)
        self.seconds += time.perf_counter() - began
        if get_tensor_model_parallel_world_size() > 1:
            # Heads are spread over the ranks, but all ranks must choose the same tokens. An
            # all-reduce may add in another order on each rank (vLLM's on CPU does), and rounding
            # would then decide close calls differently.
            scores = tensor_model_parallel_all_gather(scores[None], dim=0).sum(0)
        self.attention = scores

    def choose(self, *stream: torch.Tensor) -> torch.Tensor:
        """Choose the rows that survive, among the step's rows before the cut.

        Args:
            stream: [num_tokens, hidden_size] each; their sum is the residual stream at the cut.

        Returns:
            [cut.num_tokens] int64, ascending. It becomes `survivors`.
        """
        began = time.perf_counter()
        scores = self._criterion.score(self._candidates(stream))
        if self._criterion.needs_hidden_states:
            # Rounding of states may differ from rank to rank, but all must choose the same tokens.
            scores = get_tp_group().broadcast(scores)
        self.scores = scores
        self.survivors = surviving_rows(
            scores,
            self.image_tokens,
            self._num_tokens,
            self.tensors.padded,
            self.tensors.keep,
            self.tensors.protected,
            self.cut.num_tokens,
        )
        self.seconds += time.perf_counter() - began
        return self.survivors

    def image_tokens_left(self) -> torch.Tensor:
        """[num flat images behind the cut] rows of the image tokens, in the step behind the cut."""
        began = time.perf_counter()
        is_image = torch.zeros(self._num_tokens, dtype=torch.bool, device=self.survivors.device)
        is_image.index_fill_(0, self.image_tokens, True)
        left = compact(is_image[self.survivors], int(self.cut.keep.sum()))
        self.seconds += time.perf_counter() - began
        return left

    def values_left(self, values: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Those of `values` [num flat images] whose image tokens are left (`image_tokens_left`)."""
        by_row = values.new_empty(self._num_tokens).index_copy_(0, self.image_tokens, values)
        return by_row[self.survivors[left]]

    def _candidates(self, stream: Sequence[torch.Tensor]) -> Candidates:
        criterion = self._criterion
        if criterion.select_voters is not None:
            assert self.attention is not None, "the layer before the cut has not run"
        states = None
        if criterion.needs_hidden_states:
            first, *others = stream
            states = first.index_select(0, self.image_tokens).float()
            for part in others:
                states += part.index_select(0, self.image_tokens)
        return Candidates(
            cut=self.cut,
            index=self._index,
            device=self.image_tokens.device,
            attention=self.attention,
            states=states,
            prior=self.prior,
        )
