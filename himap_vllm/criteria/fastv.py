# SPDX-License-Identifier: Apache-2.0
"""FastV: attention of the last text row. https://arxiv.org/abs/2403.06764, section 4.1.

FastV has one cut; here the same row votes at both cuts. The last text row after an image votes for
it, or the prompt's last row if no text follows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.plan.step import PrunedRequest
from himap_vllm.plan.voters import ImageVote, IntArray

if TYPE_CHECKING:
    from himap_vllm.criteria.criterion import Cuts


def last_text_row(cuts: Cuts) -> Cuts:
    """Return the cuts with one voter per image."""
    first, second = cuts
    assert first.image_tokens is not None
    shallow, deep = [], []
    keep = iter(first.keep.tolist())
    for before, after in zip(first.requests, second.requests, strict=True):
        positions = first.image_tokens[before.image_tokens] - before.tokens.start
        images = [positions[vote.tokens] for vote in before.votes]
        rows = np.array([_voter(before, vote, images) for vote in before.votes])
        # No voter lies inside an image, so its new row does not depend on the data.
        gone = np.array([(image[-1], len(image) - next(keep)) for image in images])
        moved = rows - ((gone[:, :1] <= rows) * gone[:, 1:]).sum(0)
        shallow.append(_with_voters(before, rows))
        deep.append(_with_voters(after, moved))
    return replace(first, requests=tuple(shallow)), replace(second, requests=tuple(deep))


def _voter(request: PrunedRequest, vote: ImageVote, images: list[IntArray]) -> int:
    """The voter's row, relative to the request's rows as `PrunedRequest.rows` is."""
    assert request.rows is not None
    for row in request.rows[vote.rows][::-1].tolist():
        if not any(image[0] < row < image[-1] for image in images):  # a row break, say
            return int(row)
    return int(request.tokens.stop - request.tokens.start - 1)


def _with_voters(request: PrunedRequest, rows: IntArray) -> PrunedRequest:
    votes = tuple(
        ImageVote(rows=slice(i, i + 1), tokens=vote.tokens) for i, vote in enumerate(request.votes)
    )
    return replace(request, rows=rows, votes=votes)


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    return candidates.attention


FASTV = Criterion(name="fastv", score=_score, select_voters=last_text_row)
