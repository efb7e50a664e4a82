# SPDX-License-Identifier: Apache-2.0
"""The interface of a criterion: what it declares, and what it may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from himap_vllm.config import CriterionName
    from himap_vllm.plan.step_layout import Cut

    Cuts = tuple[Cut, Cut]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The image tokens that reach a cut, of all units that the step prunes.

    Attributes:
        cut: where they lie, and how many stay.
        index: 0 at the first cut, 1 at the second.
        device: where the scores must be.
        attention: [num flat images] float32, the attention received from the rows that vote. None
            if the criterion has no `select_voters`.
        states: [num flat images, hidden_size] float32, the residual stream. None if the criterion
            does not need it.
        prior: [num flat images] float32, the attention that a token gets for its place alone,
            relative to the mean. None if the criterion does not need it.
    """

    cut: Cut
    index: int
    device: torch.device
    attention: torch.Tensor | None
    states: torch.Tensor | None
    prior: torch.Tensor | None = None

    @property
    def images(self) -> Iterator[tuple[slice, int]]:
        """Per image: the slice of its flat images, and how many of them stay. Host only."""
        keep = iter(self.cut.keep.tolist())
        for unit in self.cut.units:
            for vote in unit.votes:
                first = unit.image_tokens.start
                yield slice(first + vote.tokens.start, first + vote.tokens.stop), next(keep)


@dataclass(frozen=True, slots=True)
class Criterion:
    """A way to rank image tokens. It decides neither how many stay, nor ties.

    Attributes:
        name: its name in `additional_config["himap"]["criterion"]`.
        score: returns [num flat images] float32. Within each image the highest scores stay; of
            equal scores, the first. It must not wait for the device.
        select_voters: takes the cuts with HiMAP's voters and returns them with the voters whose
            attention is summed. None: no attention is computed.
        needs_hidden_states: whether `score` needs `Candidates.states`.
        needs_prior: whether `score` needs `Candidates.prior`.
        seeded: whether `score` needs `PrunedUnit.seed`.
    """

    name: CriterionName
    score: Callable[[Candidates], torch.Tensor]
    select_voters: Callable[[Cuts], Cuts] | None = None
    needs_hidden_states: bool = False
    needs_prior: bool = False
    seeded: bool = False

    @property
    def needs_text(self) -> bool:
        """Whether text behind an image must be computed in the step that prunes it."""
        return self.select_voters is not None


Criteria = tuple[Criterion, Criterion]
"""The criteria of the first and of the second cut."""


def with_voters(cuts: Cuts, criteria: Criteria) -> Cuts:
    """Return the cuts, each with the voters of its criterion."""
    first, second = (
        cuts if criterion.select_voters is None else criterion.select_voters(cuts)
        for criterion in criteria
    )
    return first[0], second[1]
