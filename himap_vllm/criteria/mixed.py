# SPDX-License-Identifier: Apache-2.0
"""Choose half of the tokens by the last text row's attention, the rest far from them.

This combines FastV and DivPrune: see `fastv` and `diversity`. If the number is odd, attention
chooses one more.
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion
from himap_vllm.criteria.diversity import distances, farthest_first
from himap_vllm.criteria.fastv import last_text_row


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.attention is not None
    assert candidates.states is not None
    scores = []
    for tokens, keep in candidates.images:
        attention = candidates.attention[tokens]
        num_tokens, half = len(attention), (keep + 1) // 2
        order = torch.sort(attention, descending=True, stable=True).indices[:half]
        far = farthest_first(distances(candidates.states[tokens]), keep - half, order)
        ahead = torch.arange(2 * num_tokens, 2 * num_tokens - half, -1, device=far.device)
        scores.append(far.index_copy(0, order, ahead.float()))
    return torch.cat(scores)


MIXED = Criterion(name="mixed", score=_score, select_voters=last_text_row, needs_hidden_states=True)
