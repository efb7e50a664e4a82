# SPDX-License-Identifier: Apache-2.0
"""The position of the cuts in a decoder, and the layers of each stage. Arithmetic without vLLM."""

from __future__ import annotations

from typing import Literal

KVGrouping = Literal["few", "balanced", "many"]
"""How the layers of the stages share KV cache groups; `himap_vllm.plan.grouping` has them."""

TOLERATED_WASTE = 0.01
"""Share of the KV cache memory that cuts may waste without a word."""


def default_cuts(num_layers: int, first_cut: int = 1) -> tuple[int, int]:
    """K1 and K2 of a decoder of `num_layers` layers.

    Of the cuts at most two layers from where the paper's 2 and 8 lie in 32, those that waste the
    least KV cache memory; of these the nearest, then those with the fewest KV cache groups.

    Args:
        num_layers: of the decoder.
        first_cut: least K1 of the model.
    """
    shallow = max(first_cut, round(num_layers / 16))
    deep = max(shallow + 1, round(num_layers / 4))
    near = [
        (k1, k2)
        for k1 in range(shallow, shallow + 3)
        for k2 in range(max(k1 + 1, deep - 2), min(deep + 3, num_layers))
    ]
    # None fit into a decoder this shallow: `EngineSettings.check_depth` says so.
    return min(
        near,
        key=lambda cuts: (
            max(TOLERATED_WASTE, wasted_share(cuts[0], cuts[1], num_layers)),
            abs(cuts[0] - shallow) + abs(cuts[1] - deep),
            _num_groups(cuts[0], cuts[1], num_layers),
            -cuts[1],
        ),
        default=(shallow, deep),
    )


def better_cuts(
    shallow_layer: int, deep_layer: int, num_layers: int, first_cut: int = 1
) -> list[tuple[int, int]]:
    """The three cuts nearest to given ones that waste no more than what is tolerated, best first.

    Args:
        shallow_layer: K1.
        deep_layer: K2.
        num_layers: of the decoder.
        first_cut: least K1 of the model.
    """
    candidates = [
        (shallow, deep)
        for shallow in range(first_cut, min(2 * shallow_layer, num_layers - 2) + 1)
        for deep in range(shallow + 1, num_layers)
        if wasted_share(shallow, deep, num_layers) <= TOLERATED_WASTE
    ]
    return sorted(
        candidates,
        key=lambda cuts: (
            abs(cuts[0] - shallow_layer) + abs(cuts[1] - deep_layer),
            _num_groups(cuts[0], cuts[1], num_layers),
            -cuts[1],
        ),
    )[:3]


def wasted_share(shallow_layer: int, deep_layer: int, num_layers: int) -> float:
    """Share of the KV cache memory that belongs to no layer, with blocks of one size.

    vLLM makes the KV cache groups of all stages equally large, and fills up with padding layers
    (`vllm.v1.core.kv_cache_utils._get_kv_cache_groups_uniform_page_size`).

    Default cuts decide which tokens an answer is made from, so they must not depend on
    `kv_grouping`. Other groupings waste no more (`himap_vllm.plan.grouping.choose_grouping`).
    """
    size = group_size(*stage_layers(shallow_layer, deep_layer, num_layers))
    return 1 - num_layers / (size * _num_groups(shallow_layer, deep_layer, num_layers))


def group_size(*stages: int) -> int:
    """Layers of a KV cache group: those of the smallest stage, or all, if these are little more."""
    return max(stages) if max(stages) < 1.5 * min(stages) else min(stages)


def _num_groups(shallow_layer: int, deep_layer: int, num_layers: int) -> int:
    """KV cache groups of all stages."""
    stages = stage_layers(shallow_layer, deep_layer, num_layers)
    return sum(-(-layers // group_size(*stages)) for layers in stages)


def stage_layers(shallow_layer: int, deep_layer: int, num_layers: int) -> tuple[int, int, int]:
    """Number of decoder layers of each stage.

    Args:
        shallow_layer: K1, layers before the first cut.
        deep_layer: K2, layers before the second cut.
        num_layers: of the decoder.
    """
    return shallow_layer, deep_layer - shallow_layer, num_layers - deep_layer
