# SPDX-License-Identifier: Apache-2.0
"""How many tokens survive: the arithmetic of a prompt's pruning plan.

Everything here follows from the prompt alone, never from activations, so the scheduler, the block
allocator and the worker derive the same numbers independently, without talking to each other.
Stages count from 0: layers before the first cut, between the cuts, after the second cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
class PromptPlan:
    """The plan of one prompt: which positions are image tokens, and how many of them stay.

    `images` is in prompt order and not empty, `ratios` has those of each image. `seed` is for
    criteria that choose at random.
    """

    num_prompt_tokens: int
    images: tuple[ImageTokens, ...]
    ratios: tuple[Ratios, ...]
    seed: int = 0

    @cached_property
    def counts(self) -> tuple[tuple[int, int, int], ...]:
        """Per image: tokens in stage 0, 1 and 2."""
        rows = []
        for image, ratios in zip(self.images, self.ratios, strict=True):
            shallow = kept(image.count, ratios.shallow)
            rows.append((image.count, shallow, kept(shallow, ratios.deep)))
        return tuple(rows)

    @cached_property
    def removed(self) -> tuple[int, int, int]:
        """Tokens of the prompt that are missing in each stage."""
        seen, shallow, deep = (sum(column) for column in zip(*self.counts, strict=True))
        return 0, seen - shallow, seen - deep

    @property
    def first_image_token(self) -> int:
        """Tokens before the first image token; every layer computes those in full."""
        return self.images[0].first

    @property
    def one_step_tokens(self) -> int:
        """Tokens that must be computed in one step: the scores need all rows of the prompt."""
        return self.num_prompt_tokens - self.first_image_token

    def stage_tokens(self, stage: int, num_tokens: int) -> int:
        """KV entries that the first `num_tokens` tokens of the sequence have in `stage`.

        Raises:
            ValueError: `num_tokens` lies inside the part that is computed in one step, where the
                answer would depend on the data.
        """
        if num_tokens <= self.first_image_token:
            return num_tokens
        if num_tokens < self.num_prompt_tokens:
            raise ValueError(
                f"a pruned prompt was split at token {num_tokens}, inside the one-step part "
                f"[{self.first_image_token}, {self.num_prompt_tokens})"
            )
        return num_tokens - self.removed[stage]

    def position(self, stage: int, num_entries: int) -> int:
        """Tokens of the sequence by which `stage` has `num_entries` KV entries.

        Inside the part that is computed in one step this depends on the data; the answer there is
        the latest possible one.
        """
        if num_entries <= self.first_image_token:
            return num_entries
        return num_entries + self.removed[stage]

    def chunk(self, num_computed: int, num_new: int, step_limit: int, later: int) -> int:
        """The longest chunk of at most `num_new` tokens from `num_computed` that may be run.

        The text before the first image may run ahead of the one-step part. The prompt waits where
        that would only pin KV blocks and a running slot: a later step is sure to have room for the
        whole prompt, or it is not sure to have room for the one-step part.

        Args:
            num_computed: tokens computed so far.
            num_new: tokens that fit in this step.
            step_limit: the largest number of tokens of one request that fits in any step.
            later: tokens that fit in a later step when all requests ahead of this one decode.

        Returns:
            `num_new`, or a number of text tokens before the first image, or 0 to wait for a step
            with more room.
        """
        if num_computed + num_new >= self.num_prompt_tokens:
            return num_new
        left = self.num_prompt_tokens - num_computed
        text = self.first_image_token - num_computed
        if left <= step_limit and (left <= later or self.one_step_tokens > later):
            return 0
        if left <= step_limit and num_new < text <= later:
            return 0
        return min(num_new, text)


def make_plan(
    num_prompt_tokens: int, images: Sequence[ImageTokens], ratios: Ratios | Sequence[Ratios]
) -> PromptPlan | None:
    """Return the plan of a prompt, or None if nothing would be dropped.

    Args:
        num_prompt_tokens: text and image tokens.
        images: in prompt order.
        ratios: of all images, or of each.
    """
    if isinstance(ratios, Ratios):
        ratios = [ratios] * len(images)
    pairs = [(image, own) for image, own in zip(images, ratios, strict=True) if image.count]
    if not pairs:
        return None
    plan = PromptPlan(
        num_prompt_tokens,
        images=tuple(image for image, _ in pairs),
        ratios=tuple(own for _, own in pairs),
    )
    return plan if any(plan.removed) else None
