# SPDX-License-Identifier: Apache-2.0
"""Voters that are text at both cuts: the text rows after an image that lie inside no image.

If there are none, the unit's last row votes. Text inside a later image, a row break for example,
does not vote: at the second cut, where it is depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from himap_vllm.plan.voters import ImageVote, IntArray

if TYPE_CHECKING:
    from himap_vllm.criteria.criterion import Cuts
    from himap_vllm.plan.step_layout import PrunedUnit


def text_rows(cuts: Cuts, only_last: bool = False) -> Cuts:
    """Return the cuts with text as voters.

    Args:
        cuts: with HiMAP's voters.
        only_last: only the last of the rows votes for each image.
    """
    first, second = cuts
    assert first.image_tokens is not None
    shallow, deep = [], []
    keep = iter(first.keep.tolist())
    for before, after in zip(first.units, second.units, strict=True):
        positions = first.image_tokens[before.image_tokens] - before.tokens.start
        images = [positions[vote.tokens] for vote in before.votes]
        rows, slices = _outside(before, images)
        if only_last:
            rows = rows[[own.stop - 1 for own in slices]]
            slices = [slice(i, i + 1) for i in range(len(slices))]
        # No voter lies inside an image, so its new row does not depend on the data.
        gone = np.array([(image[-1], len(image) - next(keep)) for image in images])
        by_earlier_units = _num_rows(before) - _num_rows(after) - gone[:, 1].sum()
        moved = rows - by_earlier_units - ((gone[:, :1] <= rows) * gone[:, 1:]).sum(0)
        shallow.append(_with_voters(before, rows, slices))
        deep.append(_with_voters(after, moved, slices))
    return replace(first, units=tuple(shallow)), replace(second, units=tuple(deep))


def _num_rows(unit: PrunedUnit) -> int:
    """Rows of the step before the cut, up to the unit's end."""
    return int(unit.tokens.stop - unit.tokens.start)


def _outside(unit: PrunedUnit, images: list[IntArray]) -> tuple[IntArray, list[slice]]:
    """The voting rows, relative to the unit's, and for each image those that vote for it."""
    assert unit.rows is not None
    rows = unit.rows
    inside = np.zeros(len(rows), dtype=bool)
    for image in images:
        inside |= (image[0] < rows) & (rows < image[-1])
    before = np.concatenate([[0], np.cumsum(~inside)])
    last = int(before[-1])
    slices = [slice(int(before[v.rows.start]), int(before[v.rows.stop])) for v in unit.votes]
    rows = rows[~inside]
    if any(own.start == own.stop for own in slices):
        rows = np.append(rows, _num_rows(unit) - 1)
        slices = [own if own.start < own.stop else slice(last, last + 1) for own in slices]
    return rows, slices


def _with_voters(unit: PrunedUnit, rows: IntArray, slices: Sequence[slice]) -> PrunedUnit:
    votes = tuple(
        ImageVote(rows=own, tokens=vote.tokens)
        for own, vote in zip(slices, unit.votes, strict=True)
    )
    return replace(unit, rows=rows, votes=votes)
