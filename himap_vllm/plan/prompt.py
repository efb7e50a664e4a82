# SPDX-License-Identifier: Apache-2.0
"""How many tokens survive: the arithmetic of a prompt's pruning plan.

Everything here follows from the prompt alone, never from activations, so the scheduler, the block
allocator and the worker derive the same numbers independently, without talking to each other.
Stages count from 0: layers before the first cut, between the cuts, after the second cut.

A plan is a sequence of units. A unit is an image, or several, with the text that votes for them. It
is computed in one step, because the scores need all its rows. What lies between and behind units is
computed in any number of steps, as in vLLM itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

NUM_STAGES = 3


def kept(num_tokens: int, ratio: float) -> int:
    """Tokens left of `num_tokens` after the lowest share `ratio` in [0, 1) is dropped.

    At least one token stays. The epsilon makes ratios that are exact in decimal but not in binary
    drop the exact number (0.9 of 10 drops 9).
    """
    return max(1, num_tokens - math.floor(num_tokens * ratio + 1e-6))


@dataclass(frozen=True, slots=True, order=True)
class Ratios:
    """Share of an image's tokens dropped at the first cut, and of the rest at the second."""

    shallow: float
    deep: float

    def __str__(self) -> str:
        return f"({self.shallow:g}, {self.deep:g})"


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Positions of one image's embeddings in the prompt: ascending half-open runs.

    Structure tokens inside an image (row breaks, say) lie between runs and count as text.
    """

    runs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return sum(end - start for start, end in self.runs)

    @property
    def first(self) -> int:
        return self.runs[0][0]

    @property
    def last(self) -> int:
        return self.runs[-1][1] - 1


@dataclass(frozen=True)
class Unit:
    """Images that are pruned together, with the text that votes for them.

    The rows [start, end) of the prompt are computed in one step. Which tokens survive is a function
    of the tokens before `end` and of settings. The only exception is a prompt that ends with an
    image: its last row survives (`PromptPlan.protects`).

    Attributes:
        images: in prompt order, not empty.
        start: first image token.
        seen: last image token + 1.
        end: last row that votes + 1; not below `seen`.
        counts: per image, tokens in stage 0, 1 and 2.
        removed: tokens of the unit that are missing in each stage.
    """

    images: tuple[ImageTokens, ...]
    start: int
    seen: int
    end: int
    counts: tuple[tuple[int, int, int], ...]
    removed: tuple[int, int, int]

    @classmethod
    def of(cls, images: Sequence[ImageTokens], ratios: Sequence[Ratios], end: int) -> Unit:
        """The unit of some images that ends at `end`."""
        counts = tuple(map(_counts, images, ratios))
        all_tokens, shallow, deep = (sum(column) for column in zip(*counts, strict=True))
        return cls(
            images=tuple(images),
            start=images[0].first,
            seen=images[-1].last + 1,
            end=end,
            counts=counts,
            removed=(0, all_tokens - shallow, all_tokens - deep),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed in one step."""
        return self.end - self.start


@dataclass(frozen=True)
class PromptPlan:
    """The plan of one prompt: which positions are image tokens, and how many of them stay.

    Attributes:
        num_prompt_tokens: text and image tokens.
        images: in prompt order, not empty.
        ratios: of each image.
        ends: of each image, the end of its unit; images of one unit have the same. Empty: one unit
            that ends with the prompt.
        seeds: of each unit, for criteria that choose at random; empty: 0.
    """

    num_prompt_tokens: int
    images: tuple[ImageTokens, ...]
    ratios: tuple[Ratios, ...]
    ends: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units that drop something, in prompt order; they are disjoint."""
        ends = self.ends or (self.num_prompt_tokens,) * len(self.images)
        units, before = [], 0
        for end, group in groupby(
            zip(self.images, self.ratios, ends, strict=True), key=lambda image: image[2]
        ):
            images, ratios, _ = zip(*group, strict=True)
            unit = Unit.of(images, ratios, end)
            if not before <= unit.start < unit.seen <= end <= self.num_prompt_tokens:
                raise ValueError(
                    f"a unit [{unit.start}, {end}) with images up to {unit.seen} is not inside "
                    f"[{before}, {self.num_prompt_tokens})"
                )
            before = end
            units.append(unit)
        return tuple(unit for unit in units if any(unit.removed))

    @cached_property
    def counts(self) -> tuple[tuple[int, int, int], ...]:
        """Per image: tokens in stage 0, 1 and 2."""
        return tuple(map(_counts, self.images, self.ratios))

    @cached_property
    def removed(self) -> tuple[int, int, int]:
        """Tokens of the prompt that are missing in each stage."""
        shallow, deep = (sum(unit.removed[stage] for unit in self.units) for stage in (1, 2))
        return 0, shallow, deep

    @property
    def first_image_token(self) -> int:
        """Tokens before the first unit; every layer computes those in full."""
        return self.units[0].start

    @property
    def last_end(self) -> int:
        """The end of the last unit. All stages compute what lies behind."""
        return self.units[-1].end

    @property
    def longest_unit(self) -> int:
        """The most tokens that must be computed in one step."""
        return max(unit.num_tokens for unit in self.units)

    def seed(self, index: int) -> int:
        """Of a unit."""
        return self.seeds[index] if self.seeds else 0

    def protects(self, unit: Unit) -> bool:
        """Whether the unit's last row survives whatever its score: the next token is read there."""
        return unit.seen == self.num_prompt_tokens

    def unit_at(self, num_tokens: int) -> Unit | None:
        """The unit that `num_tokens` lies inside; None: a chunk may end there."""
        if not self.first_image_token < num_tokens < self.last_end:
            return None
        unit = self.units[bisect_left(self._ends, num_tokens)]
        return unit if unit.start < num_tokens < unit.end else None

    def resumable(self, num_tokens: int) -> int:
        """The most of the first `num_tokens` tokens behind which a sequence may be taken up.

        Not among the images of a unit. Behind them it may, if all rows that vote are known.
        """
        if not self.first_image_token < num_tokens < self.last_end:
            return num_tokens
        images = (unit for unit in self.units if unit.start < num_tokens < unit.seen)
        return next((unit.start for unit in images), num_tokens)

    def units_between(self, start: int, end: int) -> list[int]:
        """Index of each unit in the chunk [start, end).

        A chunk may begin behind a unit's images, if their entries were found in the prefix cache.

        Raises:
            ValueError: the chunk splits a unit.
        """
        for bound in (start, end):
            unit = self.unit_at(bound)
            if unit is not None and start < unit.seen:
                raise ValueError(
                    f"a chunk [{start}, {end}) splits the one-step part [{unit.start}, {unit.end}) "
                    "of a pruned prompt"
                )
        return [
            index for index, unit in enumerate(self.units) if start <= unit.start < unit.end <= end
        ]

    def stage_tokens(self, stage: int, num_tokens: int) -> int:
        """KV entries that the first `num_tokens` tokens of the sequence have in `stage`.

        Raises:
            ValueError: `num_tokens` lies among the images of a unit, where the answer would depend
                on the data.
        """
        if num_tokens <= self.first_image_token:
            return num_tokens
        if num_tokens >= self.last_end:
            return num_tokens - self.removed[stage]
        unit = self.unit_at(num_tokens)
        if unit is not None and num_tokens < unit.seen:
            raise ValueError(
                f"a pruned prompt was split at token {num_tokens}, inside the one-step part "
                f"[{unit.start}, {unit.end})"
            )
        _, gone = self._units_by_entries[stage]
        return num_tokens - gone[bisect_right(self._seen, num_tokens)]

    def position(self, stage: int, num_entries: int) -> int:
        """Tokens of the sequence by which `stage` has `num_entries` KV entries.

        Inside a part that is computed in one step this depends on the data; the answer there is
        the latest possible one.
        """
        before, gone = self._units_by_entries[stage]
        return num_entries + gone[bisect_left(before, num_entries)]

    @cached_property
    def _seen(self) -> list[int]:
        """Of each unit."""
        return [unit.seen for unit in self.units]

    @cached_property
    def _ends(self) -> list[int]:
        """Of each unit."""
        return [unit.end for unit in self.units]

    @cached_property
    def _units_by_entries(self) -> list[tuple[list[int], list[int]]]:
        """Per stage: entries before each unit; what is missing behind none, one, two, ... units."""
        tables = []
        for stage in range(NUM_STAGES):
            gone = [0, *accumulate(unit.removed[stage] for unit in self.units)]
            before = [unit.start - missing for unit, missing in zip(self.units, gone, strict=False)]
            tables.append((before, gone))
        return tables

    def chunk(self, num_computed: int, num_new: int, step_limit: int, later: int) -> int:
        """The longest chunk of at most `num_new` tokens from `num_computed` that may be run.

        It never ends inside a unit. The text before a unit may run ahead of it. The prompt waits
        where that would only pin KV blocks and a running slot: a later step is sure to have room
        for the text with the unit, or it is not sure to have room for the unit.

        Args:
            num_computed: tokens computed so far.
            num_new: tokens that fit in this step.
            step_limit: the largest number of tokens of one request that fits in any step.
            later: tokens that fit in a later step when all requests ahead of this one decode.

        Returns:
            `num_new`, or a smaller number of tokens that ends before a unit or in the text before
            it, or 0 to wait for a step with more room.
        """
        end = num_computed + num_new
        ahead = (unit for unit in self.units if unit.end > end and unit.seen > num_computed)
        unit = next(ahead, None)
        if unit is None:
            return num_new
        left, text = unit.end - num_computed, unit.start - num_computed
        if self.units_between(num_computed, min(end, unit.start)):
            return min(num_new, text)  # a unit ends in this step, so it is worth its blocks
        if left <= step_limit and (left <= later or unit.num_tokens > later):
            return 0
        if left <= step_limit and num_new < text <= later:
            return 0
        return min(num_new, text)


def make_plan(
    num_prompt_tokens: int,
    images: Sequence[ImageTokens],
    ratios: Ratios | Sequence[Ratios],
    ends: Sequence[int] = (),
) -> PromptPlan | None:
    """Return the plan of a prompt, or None if nothing would be dropped.

    Args:
        num_prompt_tokens: text and image tokens.
        images: in prompt order.
        ratios: of all images, or of each.
        ends: as `PromptPlan` has them.
    """
    if isinstance(ratios, Ratios):
        ratios = [ratios] * len(images)
    ends = ends or [num_prompt_tokens] * len(images)
    rows = [row for row in zip(images, ratios, ends, strict=True) if row[0].count]
    if not rows:
        return None
    plan = PromptPlan(
        num_prompt_tokens,
        images=tuple(image for image, _, _ in rows),
        ratios=tuple(own for _, own, _ in rows),
        ends=tuple(end for _, _, end in rows),
    )
    return plan if plan.units else None


def _counts(image: ImageTokens, ratios: Ratios) -> tuple[int, int, int]:
    """Tokens of an image in stage 0, 1 and 2."""
    shallow = kept(image.count, ratios.shallow)
    return image.count, shallow, kept(shallow, ratios.deep)
