# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive a cut. Tensor code without a device-to-host synchronisation."""

from __future__ import annotations

import torch


def surviving_rows(
    scores: torch.Tensor,
    image_tokens: torch.Tensor,
    num_tokens: int,
    padded: torch.Tensor,
    keep: torch.Tensor,
    protected: torch.Tensor,
    num_survivors: int,
) -> torch.Tensor:
    """Rows of the step that go on, ascending: all text, and each image's best tokens.

    All images of the step are sorted at once, padded to the longest.

    Args:
        scores: [num flat images] float32; ties go to the lower index.
        image_tokens: [num flat images] rows in the step.
        num_tokens: rows of the step before the cut.
        padded: `Cut.padded` as a tensor.
        keep: `Cut.keep`, likewise.
        protected: `Cut.protected`, likewise.
        num_survivors: `Cut.num_tokens`.

    Returns:
        [num_survivors] int64, rows in the step before the cut.
    """
    ranked = torch.cat([scores, scores.new_full((1,), float("-inf"))])
    ranked = ranked.index_fill(0, protected, float("inf"))
    order = torch.sort(ranked[padded], dim=1, descending=True, stable=True).indices
    place = torch.arange(padded.shape[1], device=scores.device)
    stays = place < keep[:, None]
    # One place more, where the padding lands.
    survives = torch.zeros(len(ranked), dtype=torch.bool, device=scores.device)
    survives.scatter_(0, padded.gather(1, order).flatten(), stays.flatten())
    going_on = torch.ones(num_tokens, dtype=torch.bool, device=scores.device)
    going_on.scatter_(0, image_tokens, survives[:-1])
    return compact(going_on, num_survivors)


def compact(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Indices where `mask` [n] is true, ascending; `count`, their number, is known beforehand.

    `nonzero` would wait for the device to learn the size of its result.
    """
    index = torch.arange(len(mask), device=mask.device)
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]
