# SPDX-License-Identifier: Apache-2.0
"""Retention and its uncertainty: a paired bootstrap over groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_DRAWS = 10_000
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Retention:
    """Accuracy with pruning as a share of accuracy without, and its 95 % interval.

    NaN if no unpruned answer is right.
    """

    value: float
    low: float
    high: float


def retention(
    pruned: npt.ArrayLike,
    unpruned: npt.ArrayLike,
    groups: Sequence[str],
    draws: int = _DRAWS,
    seed: int = 0,
) -> Retention:
    """Ratio of sums of scores, with a percentile interval.

    Questions about one image are not independent, so the bootstrap draws whole groups (the cluster
    bootstrap: Davison and Hinkley, Bootstrap Methods, 1997, section 3.8). Both scores of a question
    are drawn together, so that the difficulty of a question cancels.

    Args:
        pruned: [num_items] scores.
        unpruned: [num_items] scores of the same questions.
        groups: [num_items] group of each question.
        draws: number of resamples.
        seed: seed of the resampling.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(group.max()) + 1
    sums = np.stack([
        np.bincount(group, np.asarray(scores, dtype=float), num_groups)
        for scores in (pruned, unpruned)
    ])  # fmt: skip
    total, total_unpruned = sums.sum(1)
    if not total_unpruned:
        return Retention(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    ratios: list[npt.NDArray[np.float64]] = []
    for begin in range(0, draws, _CHUNK):
        drawn = rng.multinomial(
            num_groups, np.full(num_groups, 1 / num_groups), min(_CHUNK, draws - begin)
        )
        ours, theirs = sums @ drawn.T
        ratios.append(ours[theirs > 0] / theirs[theirs > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Retention(float(total / total_unpruned), float(low), float(high))
