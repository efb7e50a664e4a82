# SPDX-License-Identifier: Apache-2.0
"""The oracle's rules for choosing image tokens, one image at a time. No code of the product."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def rank(
    criterion: str, votes: torch.Tensor, states: torch.Tensor, chance: torch.Tensor, count: int
) -> tuple[torch.Tensor, float]:
    """Return the scores of an image's tokens [n], and the smallest gap of a choice on the way."""
    n, close = len(votes), math.inf
    if criterion == "random":
        return chance, close
    if criterion == "stratified":
        return _best_of_stretches(votes, count)
    if criterion == "uniform":
        scores = torch.zeros(n)
        scores[[int((i + 0.5) * n / count) for i in range(count)]] = 1.0
        return scores, close
    if criterion == "half":
        return _half_even(votes, count)
    if criterion not in ("diversity", "mixed"):
        return votes, close
    order = votes.argsort(descending=True, stable=True).tolist()
    first = order[: math.ceil(count / 2)] if criterion == "mixed" else []
    if 0 < len(first) < len(order):
        close = float(votes[order[len(first) - 1]] - votes[order[len(first)]])
    chosen, gap = _spread(states, count, first)
    scores = torch.zeros(n)
    for place, i in enumerate(chosen):
        scores[i] = count - place
    return scores, min(close, gap)


def between(values: list[float], share: float) -> float:
    """Read `values`, whose middles lie evenly in [0, 1], at `share`, on straight lines."""
    place = min(max(share * len(values) - 0.5, 0.0), len(values) - 1.0)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def _best_of_stretches(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """Return 1 for the best of each of `count` equal stretches of `scores` [n], 0 for the others.

    And the smallest gap between the best and the second of a stretch.
    """
    best, closest = torch.zeros(len(scores)), math.inf
    edges = [(i * len(scores)) // count for i in range(count + 1)]
    for begin, end in pairwise(edges):
        ranked = sorted(range(begin, end), key=lambda i: (-float(scores[i]), i))
        best[ranked[0]] = 1.0
        if len(ranked) > 1:
            closest = min(closest, float(scores[ranked[0]] - scores[ranked[1]]))
    return best, closest


def _half_even(votes: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """Half of `count` tokens evenly spaced, and the most attended of the others behind them.

    Return scores, 0 for those that go, and the gap between the last that stays and the next.
    """
    half = count // 2
    even = {int((i + 0.5) * len(votes) / half) for i in range(half)}
    others = [i for i in range(len(votes)) if i not in even]
    others.sort(key=lambda i: (-float(votes[i]), i))
    chosen, rest = others[: count - half], others[count - half :]
    scores = torch.zeros(len(votes))
    for place, i in enumerate([*sorted(even), *chosen]):
        scores[i] = count - place  # the last of them makes room for a protected row
    gap = float(votes[chosen[-1]] - votes[rest[0]]) if rest else math.inf
    return scores, gap


def _spread(states: torch.Tensor, count: int, first: list[int]) -> tuple[list[int], float]:
    """Greedy max-min: `count` indices into `states` [n, hidden], those of `first` at the front.

    Return them in the order of their choice, and the smallest gap that a choice was made by.
    """
    offset = states - states.mean(dim=0, keepdim=True)
    offset = offset / offset.norm(dim=1, keepdim=True)
    apart = [[1.0 - float(a @ b) for b in offset] for a in offset]
    chosen, closest = list(first), math.inf
    while len(chosen) < count:
        # How far each candidate is from what it is compared with: the chosen, or all others.
        reach = {
            i: min(row[j] for j in (chosen or range(len(row))) if j != i)
            for i, row in enumerate(apart)
            if i not in chosen and len(row) > 1
        } or {0: 0.0}
        ranked = sorted(reach, key=lambda i: (-reach[i], i))
        if len(ranked) > 1:
            closest = min(closest, reach[ranked[0]] - reach[ranked[1]])
        chosen.append(ranked[0])
    return chosen, closest
