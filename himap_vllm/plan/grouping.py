# SPDX-License-Identifier: Apache-2.0
"""KV cache groups of the stages: how many, and of which block size. Arithmetic without vLLM.

All groups take pages from one pool, so a page has one size in bytes. A page holds `block_size`
tokens of each layer of a group: a stage of few layers needs few groups only if it has large blocks.
A prefix is found in the cache up to a position at which the blocks of all stages end, so large
blocks cost hits. `kv_grouping` chooses between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm

from himap_vllm.plan.cuts import TOLERATED_WASTE, KVGrouping, group_size

BALANCED_ALIGNMENT = 5
"""Smallest blocks to which "balanced" may align the hits of the prefix cache."""

_LARGEST = 32  # smallest blocks in a block, with "few"


@dataclass(frozen=True, slots=True)
class Grouping:
    """KV cache groups by stage.

    Attributes:
        layers: of each stage.
        block_sizes: tokens per block of each stage.
        parts: groups of each stage. A stage's layers are dealt out to them in turn.
    """

    layers: tuple[int, ...]
    block_sizes: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """Of all stages."""
        return sum(self.parts)

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks have the same number of tokens, which vLLM groups by itself."""
        return len(set(self.block_sizes)) == 1

    @property
    def alignment(self) -> int:
        """Hits of the prefix cache are multiples of this number of tokens."""
        return lcm(*self.block_sizes)

    @property
    def page(self) -> int:
        """Size of a block in tokens times layers."""
        return max(
            -(-layers // parts) * size
            for layers, size, parts in zip(self.layers, self.block_sizes, self.parts, strict=True)
        )

    @property
    def wasted_share(self) -> float:
        """Share of the KV cache memory that belongs to no layer, for long sequences."""
        taken = sum(
            parts * self.page / size
            for size, parts in zip(self.block_sizes, self.parts, strict=True)
        )
        return 1 - sum(self.layers) / taken


def choose_grouping(
    kv_grouping: KVGrouping, layers: Sequence[int], block_size: int, unit: int
) -> Grouping:
    """The KV cache groups of a decoder.

    "many" has blocks of one size, as vLLM makes them of the stages. "balanced" has the fewest
    groups with hits that align to at most `BALANCED_ALIGNMENT` units, or to `block_size`. "few" has
    one group per stage, one of them with blocks of one unit. No choice wastes more than
    `TOLERATED_WASTE`, unless "many" does, and then not more than that. Where "few" finds nothing,
    "balanced" answers.

    Args:
        kv_grouping: the operator's choice.
        layers: [stages] number of layers.
        block_size: tokens per block that the engine was configured with.
        unit: block sizes are multiples of this, and of what the attention kernel takes.
    """
    many = _many(layers, block_size)
    if kv_grouping == "many":
        return many
    tolerated = max(TOLERATED_WASTE, many.wasted_share)
    if kv_grouping == "few":
        few = _few(layers, unit, tolerated)
        if few is not None:
            return few
    limit = max(block_size, BALANCED_ALIGNMENT * unit)
    found = [many, *_with_alignment(layers, unit, limit)]
    return min(
        (grouping for grouping in found if grouping.wasted_share <= tolerated), key=_preference
    )


def _many(layers: Sequence[int], block_size: int) -> Grouping:
    """As vLLM groups layers with blocks of one size."""
    size = group_size(*layers)
    parts = tuple(-(-count // size) for count in layers)
    return Grouping(tuple(layers), (block_size,) * len(layers), parts)


def _few(layers: Sequence[int], unit: int, tolerated: float) -> Grouping | None:
    """One group per stage."""
    found = (
        Grouping(tuple(layers), tuple(unit * factor for factor in factors), (1,) * len(layers))
        for factors in product(range(1, _LARGEST + 1), repeat=len(layers))
        if 1 in factors
    )
    fitting = (grouping for grouping in found if grouping.wasted_share <= tolerated)
    return min(fitting, key=_preference, default=None)


def _with_alignment(layers: Sequence[int], unit: int, limit: int) -> list[Grouping]:
    """All groupings whose hits align to at most `limit` tokens."""
    found = []
    for sizes in product(range(unit, limit + 1, unit), repeat=len(layers)):
        if lcm(*sizes) > limit:
            continue
        pages = {
            -(-count // parts) * size
            for count, size in zip(layers, sizes, strict=True)
            for parts in range(1, count + 1)
        }
        for page in pages:
            fit = [page // size for size in sizes]
            if min(fit) > 0:
                parts = tuple(-(-count // n) for count, n in zip(layers, fit, strict=True))
                found.append(Grouping(tuple(layers), sizes, parts))
    return found


def _preference(grouping: Grouping) -> tuple[int, int, int]:
    """Fewest groups, then finest hits, then largest pages."""
    return grouping.num_groups, grouping.alignment, -grouping.page
