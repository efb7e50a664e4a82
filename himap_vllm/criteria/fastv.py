# SPDX-License-Identifier: Apache-2.0
"""FastV: attention of the last text row. https://arxiv.org/abs/2403.06764, section 4.1.

FastV has one cut; here the same row votes at both cuts. The last text row after an image votes for
it, or the prompt's last row if no text follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.text_rows import text_rows

if TYPE_CHECKING:
    from himap_vllm.criteria.criterion import Cuts


def last_text_row(cuts: Cuts) -> Cuts:
    """Return the cuts with one voter per image."""
    return text_rows(cuts, only_last=True)


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    return candidates.attention


FASTV = Criterion(name="fastv", score=_score, select_voters=last_text_row)
