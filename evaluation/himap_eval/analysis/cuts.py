# SPDX-License-Identifier: Apache-2.0
"""Which cuts lose little of what the model reads from its images, and what they cost.

HiMAP's choice of tokens is made from each layer's attention, on paper. What is lost of a later
layer's reading is the attention that its instruction rows pay to tokens that are gone, weighed by
how much that layer's reading matters (`layer_weights`). That is a prediction: the model with fewer
tokens attends differently. `--check` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himap_vllm.plan.cuts import TOLERATED_WASTE, KVGrouping, stage_layers
from himap_vllm.plan.grouping import choose_grouping
from himap_vllm.plan.prompt import Ratios, kept

from .measure import FloatArray, Observation

BoolArray = npt.NDArray[np.bool_]

_BLOCK_SIZE = 16  # tokens; what vLLM takes on a GPU
_NEARLY = 0.05
_GROUPINGS: tuple[KVGrouping, KVGrouping] = ("balanced", "few")


@dataclass(frozen=True, slots=True)
class Cuts:
    """A pair of cuts.

    Attributes:
        shallow_layer: K1.
        deep_layer: K2.
        lost: predicted share of the reading of images that is lost.
        token_layers: share of the image token-layers that is left.
    """

    shallow_layer: int
    deep_layer: int
    lost: float
    token_layers: float


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """What cuts cost the KV cache.

    Attributes:
        num_groups: KV cache groups with `kv_grouping` "balanced", the default.
        num_groups_few: with "few".
        wasted: share of the KV cache memory that belongs to no layer, with "balanced".
    """

    num_groups: int
    num_groups_few: int
    wasted: float


def memory_cost(shallow_layer: int, deep_layer: int, num_layers: int) -> MemoryCost:
    """What cuts cost the KV cache, with blocks of 16 tokens."""
    stages = stage_layers(shallow_layer, deep_layer, num_layers)
    balanced, few = (
        choose_grouping(grouping, stages, _BLOCK_SIZE, _BLOCK_SIZE) for grouping in _GROUPINGS
    )
    return MemoryCost(balanced.num_groups, few.num_groups, balanced.wasted_share)


def all_cuts(
    observations: Sequence[Observation], weights: FloatArray, ratios: Ratios, first_cut: int
) -> list[Cuts]:
    """Every pair of cuts, in order.

    Args:
        observations: of all questions.
        weights: [num_layers] of the reading of each layer; sum 1.
        ratios: of both cuts.
        first_cut: least K1 of the model.
    """
    num_layers = len(weights)
    lost = np.mean([_lost(seen, weights, ratios) for seen in observations], axis=0)
    middle, last = 1 - ratios.shallow, (1 - ratios.shallow) * (1 - ratios.deep)
    return [
        Cuts(
            shallow_layer=first,
            deep_layer=second,
            lost=float(lost[first, second]),
            token_layers=(first + (second - first) * middle + (num_layers - second) * last)
            / num_layers,
        )
        for first in range(first_cut, num_layers - 1)
        for second in range(first + 1, num_layers)
    ]


def recommended(cuts: Sequence[Cuts], num_layers: int) -> Cuts:
    """The cuts with the smallest sum of what is lost and what is left to compute.

    A point of the reading of images counts as much as a point of the image token-layers. Of sums
    that are nearly equal, the one that wastes little KV cache memory and has the fewest groups.
    """
    least = min(map(_sum, cuts))

    def cost(one: Cuts) -> tuple[float, int, float]:
        memory = memory_cost(one.shallow_layer, one.deep_layer, num_layers)
        return max(TOLERATED_WASTE, memory.wasted), memory.num_groups, _sum(one)

    return min((one for one in cuts if _sum(one) <= least + _NEARLY), key=cost)


def _sum(one: Cuts) -> float:
    return one.lost + one.token_layers


def _lost(seen: Observation, weights: FloatArray, ratios: Ratios) -> FloatArray:
    """[num_layers, num_layers] share of the reading that cuts K1 < K2 lose for one question."""
    num_layers = len(weights)
    totals = seen.from_text.sum(axis=1, keepdims=True)
    reading = weights[:, None] * seen.from_text / np.maximum(totals, 1e-12)
    # later[k]: what the layers from k on read of each token.
    later = np.vstack([np.cumsum(reading[::-1], axis=0)[::-1], np.zeros_like(reading[:1])])
    lost = np.zeros((num_layers, num_layers))
    for first in range(1, num_layers):
        once = _survivors(seen, seen.from_text[first - 1], ratios.shallow, None)
        for second in range(first + 1, num_layers):
            twice = _survivors(seen, seen.from_image[second - 1], ratios.deep, once)
            between = later[first] - later[second]
            lost[first, second] = between[~once].sum() + later[second][~twice].sum()
    return lost


def _survivors(
    seen: Observation, scores: FloatArray, ratio: float, alive: BoolArray | None
) -> BoolArray:
    """[num_image_tokens] whether a token stays, chosen among those that are alive, by image."""
    stays = np.zeros(len(scores), dtype=bool)
    for places in _images(seen):
        own = places if alive is None else places[alive[places]]
        order = own[np.argsort(-scores[own], kind="stable")]
        stays[order[: kept(len(own), ratio)]] = True
    return stays


def _images(seen: Observation) -> Iterator[npt.NDArray[np.intp]]:
    """Places of each image's tokens among all image tokens."""
    begin = 0
    for size in seen.image_sizes:
        yield np.arange(begin, begin + size)
        begin += size
