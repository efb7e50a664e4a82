# SPDX-License-Identifier: Apache-2.0
"""Counters of what was pruned, kept in the worker, which holds the block tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from himap_vllm.plan.prompt import PromptPlan


@dataclass
class PruningStats:
    """Monotonic counters since the worker started or since `reset`.

    A preempted prompt still counts once.

    Attributes:
        requests: prompts with images, by outcome: `pruned`; `reused` (one to prune, all images of
            which the prefix cache had); `unpruned` (the request's or the default ratios are 0); or
            `bypassed_<reason>` (only the server's default asked for pruning, and the prompt could
            not be pruned).
        recomputed: pruned prompts computed again after a preemption.
        image_tokens: image tokens of pruned prompts.
        image_tokens_kept_shallow: of these, alive after the first cut.
        image_tokens_kept_deep: of these, alive after the second cut.
        image_tokens_reused: image tokens that were found in the prefix cache as they were pruned
            before; also those of `reused` prompts.
        image_tokens_pruned: image tokens of all other images of which a cut drops something.
        image_tokens_unpruned: image tokens of images that stay whole, whether the prefix cache had
            them or not. These three add up to the image tokens of all prompts that arrived.
        kv_blocks: blocks that the scheduler allocated to pruned prompts, all KV cache groups, when
            the last of their units was computed; counted from the block tables.
        kv_blocks_saved: blocks these prompts would have held on top, had no token been dropped.
        kv_bytes_saved: the same in bytes, on this worker.
        steps: steps that pruned something.
        pruning_seconds: host time of scoring and selection in those steps; on a device that runs
            asynchronously this is the time to launch them.
        last_step_pruning_seconds: the same for the latest such step.
    """

    requests: Counter[str] = field(default_factory=Counter)
    recomputed: int = 0
    image_tokens: int = 0
    image_tokens_kept_shallow: int = 0
    image_tokens_kept_deep: int = 0
    image_tokens_reused: int = 0
    image_tokens_pruned: int = 0
    image_tokens_unpruned: int = 0
    kv_blocks: int = 0
    kv_blocks_saved: int = 0
    kv_bytes_saved: int = 0
    steps: int = 0
    pruning_seconds: float = 0.0
    last_step_pruning_seconds: float = 0.0

    def count_images(self, plan: PromptPlan, num_found: int) -> bool:
        """Account for the images of a prompt to prune that has arrived.

        Args:
            plan: of the prompt.
            num_found: tokens at its beginning that the prefix cache had.

        Returns:
            Whether all that would be pruned was found.
        """
        to_prune = [unit for unit in plan.units if unit.seen > num_found]
        reused = sum(
            image.count for unit in plan.units if unit.seen <= num_found for image in unit.images
        )
        pruned = sum(seen for unit in to_prune for seen, _, kept in unit.counts if kept < seen)
        self.image_tokens_reused += reused
        self.image_tokens_pruned += pruned
        self.image_tokens_unpruned += sum(image.count for image in plan.images) - reused - pruned
        if not to_prune:
            self.requests["reused"] += 1
        return not to_prune

    def count_unpruned(self, outcome: str, num_image_tokens: int) -> None:
        """Account for a prompt with images that has arrived and is not pruned."""
        self.requests[outcome] += 1
        self.image_tokens_unpruned += num_image_tokens

    def count_prompt(self, plan: PromptPlan) -> None:
        """Account for one pruned prompt."""
        seen, shallow, deep = (sum(column) for column in zip(*plan.counts, strict=True))
        self.requests["pruned"] += 1
        self.image_tokens += seen
        self.image_tokens_kept_shallow += shallow
        self.image_tokens_kept_deep += deep

    def count_recomputed(self) -> None:
        """Account for a pruned prompt that is computed again."""
        self.recomputed += 1

    def count_step(self, seconds: float) -> None:
        """Account for the time of one pruning step."""
        self.steps += 1
        self.pruning_seconds += seconds
        self.last_step_pruning_seconds = seconds

    def count_blocks(self, held: Sequence[int], unpruned: Sequence[int], size: int) -> None:
        """Account for one prompt's blocks.

        Args:
            held: [num_groups] length of the prompt's block table in each group.
            unpruned: [num_groups] what that length would be without pruning.
            size: bytes per block, the same for all groups, as they share one pool.
        """
        saved = sum(unpruned) - sum(held)
        self.kv_blocks += sum(held)
        self.kv_blocks_saved += saved
        self.kv_bytes_saved += saved * size

    def reset(self) -> None:
        """Start all counters anew."""
        vars(self).update(vars(PruningStats()))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {**vars(self), "requests": dict(self.requests)}
