# SPDX-License-Identifier: Apache-2.0
"""Who votes in HiMAP: the rows whose attention scores an image's tokens, at either cut.

HiMAP (https://arxiv.org/abs/2503.13108), Eq. 8 and 9. Other criteria have voters of their own
(`Criterion.select_voters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from himap_vllm.plan.prompt import Unit

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageVote:
    """The voters of one image: slices into a unit's voting rows and its image tokens."""

    rows: slice
    tokens: slice


def text_votes(unit: Unit, image_positions: IntArray) -> tuple[IntArray, tuple[ImageVote, ...]]:
    """First cut: the text of the unit behind an image votes for it; without any, its last row.

    Args:
        unit: of a prompt.
        image_positions: [num_image_tokens] positions of its image tokens in the prompt.

    Returns:
        [num_rows] voting rows as positions in the prompt, and the vote of each image.
    """
    begin = unit.images[0].last
    text = np.ones(unit.end - begin, dtype=bool)
    text[image_positions[image_positions >= begin] - begin] = False
    rows = np.flatnonzero(text) + begin
    votes, offset = [], 0
    no_text_after = not len(rows) or unit.images[-1].last > rows[-1]
    if no_text_after:
        rows = np.append(rows, unit.end - 1)
    num_text = len(rows) - int(no_text_after)
    for image in unit.images:
        first_after = int(np.searchsorted(rows[:num_text], image.last))
        voters = slice(first_after, num_text)
        if first_after == num_text:
            voters = slice(num_text, num_text + 1)
        votes.append(ImageVote(rows=voters, tokens=slice(offset, offset + image.count)))
        offset += image.count
    return rows, tuple(votes)


def own_votes(unit: Unit) -> tuple[ImageVote, ...]:
    """Second cut: the tokens of an image that survived the first one vote for that image."""
    votes, begin = [], 0
    for _, count, _ in unit.counts:
        own = slice(begin, begin + count)
        votes.append(ImageVote(rows=own, tokens=own))
        begin += count
    return tuple(votes)
