# SPDX-License-Identifier: Apache-2.0
"""What a criterion declares, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from himap_vllm.config import CriterionName
    from himap_vllm.plan.step import Cut

    Cuts = tuple[Cut, Cut]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The image tokens that reach a cut, of all prompts that the step prunes.

    Attributes:
        cut: where they lie and how many are to stay.
        index: 0: the first cut, 1: the second.
        device: where scores are wanted.
        attention: [num flat images] float32, received from the rows that vote. None: the criterion
            has no `select_voters`.
        states: [num flat images, hidden_size] float32, the residual stream. None: the criterion
            does not read it.
    """

    cut: Cut
    index: int
    device: torch.device
    attention: torch.Tensor | None
    states: torch.Tensor | None

    @property
    def images(self) -> Iterator[tuple[slice, int]]:
        """Per image its flat images and how many of them stay; known on the host."""
        keep = iter(self.cut.keep.tolist())
        for request in self.cut.requests:
            for vote in request.votes:
                first = request.image_tokens.start
                yield slice(first + vote.tokens.start, first + vote.tokens.stop), next(keep)


@dataclass(frozen=True, slots=True)
class Criterion:
    """A way to rank image tokens. How many stay, and ties, are not its business.

    Attributes:
        name: in `additional_config["himap"]["criterion"]`.
        score: [num flat images] float32; within each image the highest stay, and of equal ones
            the first. Without waiting for the device.
        select_voters: whose attention is summed up: the cuts with these voters, given the cuts with
            HiMAP's. None: no attention is computed.
        needs_hidden_states: whether `score` wants hidden states.
        seeded: whether `score` wants `PrunedRequest.seed`.
    """

    name: CriterionName
    score: Callable[[Candidates], torch.Tensor]
    select_voters: Callable[[Cuts], Cuts] | None = None
    needs_hidden_states: bool = False
    seeded: bool = False
