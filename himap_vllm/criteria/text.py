# SPDX-License-Identifier: Apache-2.0
"""Keep the tokens that the text behind an image attends to, at both cuts.

This is HiMAP's first cut (https://arxiv.org/abs/2503.13108, Eq. 8) at the second one, too, where
the paper has image tokens vote. A question knows where to look some layers later than the first
cut, so it is worth more at the second one.
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    return candidates.attention


TEXT = Criterion(name="text", score=_score, select_voters=text_rows)
