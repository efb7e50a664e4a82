# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive a cut. Tensor code without a device-to-host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from himap_vllm.plan.step import Cut


@dataclass(frozen=True, slots=True)
class SurvivorCounts:
    """What `Cut` says of survivors, its arrays as tensors; see there for the index spaces.

    Attributes:
        padded: [num_images, longest image] int64.
        keep: [num_images] int64.
        protected: int64.
        num_tokens: rows after the cut.
    """

    padded: torch.Tensor
    keep: torch.Tensor
    protected: torch.Tensor
    num_tokens: int

    @classmethod
    def of(cls, cut: Cut) -> SurvivorCounts:
        """On the host."""
        padded, keep, protected = map(torch.from_numpy, (cut.padded, cut.keep, cut.protected))
        return cls(padded, keep, protected, cut.num_tokens)


def surviving_rows(
    scores: torch.Tensor, image_tokens: torch.Tensor, num_tokens: int, counts: SurvivorCounts
) -> torch.Tensor:
    """Rows of the step that go on, ascending: all text, and each image's best tokens.

    All images of the step are sorted at once, padded to the longest.

    Args:
        scores: [num flat images] float32; ties go to the lower index.
        image_tokens: [num flat images] rows in the step.
        num_tokens: rows of the step before the cut.
        counts: how many tokens of each image to keep.

    Returns:
        [counts.num_tokens] int64, rows in the step before the cut.
    """
    ranked = torch.cat([scores, scores.new_full((1,), float("-inf"))])
    ranked = ranked.index_fill(0, counts.protected, float("inf"))
    padded = counts.padded
    order = torch.sort(ranked[padded], dim=1, descending=True, stable=True).indices
    place = torch.arange(padded.shape[1], device=scores.device)
    keep = place < counts.keep[:, None]
    # One place more, where the padding lands.
    survives = torch.zeros(len(ranked), dtype=torch.bool, device=scores.device)
    survives.scatter_(0, padded.gather(1, order).flatten(), keep.flatten())
    going_on = torch.ones(num_tokens, dtype=torch.bool, device=scores.device)
    going_on.scatter_(0, image_tokens, survives[:-1])
    return compact(going_on, counts.num_tokens)


def compact(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Indices where `mask` [n] is true, ascending; `count`, their number, is known beforehand.

    `nonzero` would wait for the device to learn the size of its result.
    """
    index = torch.arange(len(mask), device=mask.device)
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]
