# SPDX-License-Identifier: Apache-2.0
"""HiMAP: attention of the text rows at the first cut, and of the image's own rows at the second.

https://arxiv.org/abs/2503.13108, Eq. 8 and 9. `himap_vllm.plan.voters` names these voters,
and the other criteria start from them.
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    return candidates.attention


HIMAP = Criterion(name="himap", score=_score, select_voters=lambda cuts: cuts)
