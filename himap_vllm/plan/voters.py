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
    from himap_vllm.plan.prompt import PromptPlan

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageVote:
    """The voters of one image: slices into a request's voting rows and its image tokens."""

    rows: slice
    tokens: slice


def text_votes(
    plan: PromptPlan, image_positions: IntArray
) -> tuple[IntArray, tuple[ImageVote, ...]]:
    """First cut: the text after an image votes for it; without any, the prompt's last row.

    Args:
        plan: the prompt's.
        image_positions: [num_image_tokens] positions of image tokens in the prompt.

    Returns:
        [num_rows] voting rows as positions in the prompt, and the vote of each image.
    """
    last_row = plan.num_prompt_tokens - 1
    text = np.ones(plan.num_prompt_tokens, dtype=bool)
    text[image_positions] = False
    text[: plan.images[0].last] = False
    rows = np.flatnonzero(text)
    votes, begin = [], 0
    no_text_after = not len(rows) or plan.images[-1].last > rows[-1]
    if no_text_after:
        rows = np.append(rows, last_row)
    num_text = len(rows) - int(no_text_after)
    for image in plan.images:
        first_after = int(np.searchsorted(rows[:num_text], image.last))
        voters = slice(first_after, num_text)
        if first_after == num_text:
            voters = slice(num_text, num_text + 1)
        votes.append(ImageVote(rows=voters, tokens=slice(begin, begin + image.count)))
        begin += image.count
    return rows, tuple(votes)


def own_votes(plan: PromptPlan) -> tuple[ImageVote, ...]:
    """Second cut: the tokens of an image that survived the first one vote for that image."""
    votes, begin = [], 0
    for _, count, _ in plan.counts:
        own = slice(begin, begin + count)
        votes.append(ImageVote(rows=own, tokens=own))
        begin += count
    return tuple(votes)
