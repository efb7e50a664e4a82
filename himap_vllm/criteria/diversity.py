# SPDX-License-Identifier: Apache-2.0
"""Keep tokens far from each other: greedy max-min distance of their hidden states at the cut.

DivPrune (https://arxiv.org/abs/2503.02175, Algorithm 1) solves the same problem, max-min diversity,
on the vision tower's output. Centring removes the direction that a decoder's states share.
"""

from __future__ import annotations

import torch

from himap_vllm.criteria.criterion import Candidates, Criterion


def distances(states: torch.Tensor) -> torch.Tensor:
    """[n, n]: one minus the cosine similarity of the centred `states` [n, hidden_size]."""
    unit = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
    return 1 - unit @ unit.T


def farthest_first(
    distance: torch.Tensor, count: int, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """Add `count` tokens one by one, each the farthest from those already chosen.

    The loop makes several small launches per token. None of them waits for the device.

    Args:
        distance: [n, n].
        count: number of tokens to add.
        chosen: [m] indices that are chosen from the start. None: start with the token whose
            nearest neighbour is farthest.

    Returns:
        [n] float32: n for the first added token, n - 1 for the second, ...; 0 for the others.
    """
    scores = distance.new_zeros(len(distance))
    if chosen is None:
        others = torch.eye(len(distance), device=distance.device) * float(len(distance))
        nearest = (distance + others).amin(0)
    else:
        nearest = distance.index_select(0, chosen).amin(0).index_fill(0, chosen, -1.0)
    for place in range(count):
        added = nearest.argmax(0, keepdim=True)  # the first of equal values
        scores.index_fill_(0, added, float(len(distance) - place))
        to_added = distance.index_select(0, added)[0]
        nearest = to_added if chosen is None and place == 0 else nearest.minimum(to_added)
        nearest = nearest.index_fill(0, added, -1.0)
    return scores


def _score(candidates: Candidates) -> torch.Tensor:
    assert candidates.states is not None
    return torch.cat(
        [
            farthest_first(distances(candidates.states[tokens]), keep)
            for tokens, keep in candidates.images
        ]
    )


DIVERSITY = Criterion(name="diversity", score=_score, needs_hidden_states=True)
