# SPDX-License-Identifier: Apache-2.0
"""Keep the most attended token of each of k equal stretches of an image, in raster order.

This is stratified sampling: the picture is covered as by `uniform`, and within a stretch attention
decides. Text rows vote at both cuts, as `text_rows` has it. Attention is compared among neighbours
only, so its preference for some positions has little influence.
"""

from __future__ import annotations

import numpy as np
import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows
from himap_vllm.kernels.upload import upload


def best_of_stretches(scores: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """[num flat images] float32: 1 for the best token of each stretch, 0 for the others.

    Of an image's n tokens, stretch i of k has those from floor(i n / k) to floor((i + 1) n / k).
    Two sorts, whatever the number of images; of equal scores the first wins.
    """
    begins = []
    for tokens, keep in candidates.images:
        num_tokens = tokens.stop - tokens.start
        begins.append(tokens.start + np.arange(keep, dtype=np.int64) * num_tokens // keep)
    begin = np.concatenate(begins)
    widths = np.diff(begin, append=len(scores))
    stretch = np.repeat(np.arange(len(begin)), widths)
    first, stretches = upload([begin, stretch], candidates.device)
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(stretches[order], stable=True).indices]
    return torch.zeros_like(scores).index_fill_(0, order[first], 1.0)


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    return best_of_stretches(candidates.attention, candidates)


STRATIFIED = Criterion(name="stratified", score=_score, select_voters=text_rows)
