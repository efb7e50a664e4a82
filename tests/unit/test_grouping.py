# SPDX-License-Identifier: Apache-2.0
"""Block sizes and KV cache groups by arithmetic."""

from __future__ import annotations

import pytest

from himap_vllm.plan.cuts import TOLERATED_WASTE, KVGrouping, default_cuts, stage_layers
from himap_vllm.plan.grouping import BALANCED_ALIGNMENT, Grouping, choose_grouping

DEPTHS = (6, 12, 16, 18, 22, 24, 28, 30, 32, 34, 36, 40, 46, 48, 60, 61, 62, 64, 80)


def default_layers(num_layers: int) -> tuple[int, ...]:
    return stage_layers(*default_cuts(num_layers), num_layers)


@pytest.mark.parametrize(
    ("kv_grouping", "layers", "block_size", "unit", "block_sizes", "parts"),
    [
        ("balanced", (2, 6, 24), 16, 16, (48, 16, 16), (1, 1, 4)),
        ("few", (2, 6, 24), 16, 16, (192, 64, 16), (1, 1, 1)),
        ("many", (2, 6, 24), 16, 16, (16, 16, 16), (1, 3, 12)),
        ("balanced", (2, 6, 20), 16, 16, (80, 80, 16), (1, 3, 2)),
        ("many", (2, 6, 20), 16, 16, (16, 16, 16), (1, 3, 10)),
        # One group per stage would need blocks of 480, 160 and 48 tokens.
        ("few", (2, 6, 20), 16, 16, (80, 80, 16), (1, 3, 2)),
        # On a CPU, blocks are multiples of 32, and 128 by default.
        ("balanced", (2, 6, 24), 128, 32, (96, 32, 32), (1, 1, 4)),
        ("balanced", (2, 6, 24), 128, 128, (384, 128, 128), (1, 1, 4)),
        # Stages of little difference are one group each in vLLM's own way.
        ("many", (4, 5, 5), 16, 16, (16, 16, 16), (1, 1, 1)),
        ("balanced", (4, 4, 4), 16, 16, (16, 16, 16), (1, 1, 1)),
        # 60 layers in groups of 4 waste 6.3 %. These waste less.
        ("few", (4, 7, 49), 16, 16, (112, 112, 16), (1, 1, 1)),
        ("balanced", (4, 7, 49), 16, 16, (64, 32, 16), (1, 1, 3)),
    ],
)
def test_known_groupings(
    kv_grouping: KVGrouping,
    layers: tuple[int, ...],
    block_size: int,
    unit: int,
    block_sizes: tuple[int, ...],
    parts: tuple[int, ...],
) -> None:
    found = choose_grouping(kv_grouping, layers, block_size, unit)
    assert (found.block_sizes, found.parts) == (block_sizes, parts)


@pytest.mark.parametrize("kv_grouping", ["few", "balanced"])
@pytest.mark.parametrize("num_layers", DEPTHS)
def test_default_cuts(kv_grouping: KVGrouping, num_layers: int) -> None:
    layers = default_layers(num_layers)
    many = choose_grouping("many", layers, 16, 16)
    found = choose_grouping(kv_grouping, layers, 16, 16)
    assert found.num_groups <= many.num_groups
    assert found.wasted_share <= max(TOLERATED_WASTE, many.wasted_share)
    assert all(size % 16 == 0 for size in found.block_sizes)
    if kv_grouping == "balanced" or found.num_groups > len(layers):
        assert found.alignment <= 16 * BALANCED_ALIGNMENT


@pytest.mark.parametrize("num_layers", [24, 28, 32, 36, 48, 64, 80])
def test_common_depths_have_six_groups(num_layers: int) -> None:
    found = choose_grouping("balanced", default_layers(num_layers), 16, 16)
    assert found.num_groups <= 6
    assert found.wasted_share == pytest.approx(0)


@pytest.mark.parametrize("layers", [(2, 6, 24), (2, 6, 20), (3, 9, 34), (4, 12, 46), (2, 5, 21)])
@pytest.mark.parametrize("kv_grouping", ["few", "balanced", "many"])
def test_waste_is_what_pages_of_a_long_sequence_leave_empty(
    kv_grouping: KVGrouping, layers: tuple[int, ...]
) -> None:
    found = choose_grouping(kv_grouping, layers, 16, 16)
    dealt = [
        len(range(part, count, parts))
        for count, parts in zip(layers, found.parts, strict=True)
        for part in range(parts)
    ]
    assert sum(dealt) == sum(layers)
    sizes = [
        size
        for size, parts in zip(found.block_sizes, found.parts, strict=True)
        for _ in range(parts)
    ]
    assert max(n * size for n, size in zip(dealt, sizes, strict=True)) == found.page
    num_tokens = found.alignment * 1000
    pages = sum(num_tokens // size for size in sizes)
    used = num_tokens * sum(layers) / (pages * found.page)
    assert found.wasted_share == pytest.approx(1 - used)


def test_unequal_pages_waste() -> None:
    grouping = Grouping((2, 5, 21), (160, 64, 16), (1, 1, 1))
    assert grouping.page == 336
    assert grouping.wasted_share == pytest.approx(1 - 28 / (336 / 160 + 336 / 64 + 336 / 16))
