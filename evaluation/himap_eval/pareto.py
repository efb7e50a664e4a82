# SPDX-License-Identifier: Apache-2.0
"""Cells of a sweep: the Pareto front, and the ratios that reach a given reduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from himap_vllm.plan.cuts import default_cuts
from himap_vllm.plan.prompt import Ratios

from .results import Result

_LARGEST_RATIO = 0.99


@dataclass(frozen=True, slots=True, order=True)
class EngineChoice:
    """Settings that an engine must be started with."""

    criterion: str
    shallow_layer: int
    deep_layer: int

    @property
    def layers(self) -> str:
        """`K = (2, 8)`."""
        return f"K = ({self.shallow_layer}, {self.deep_layer})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of a sweep.

    Attributes:
        engine: settings of its engine.
        result: its numbers.
        scores: [num_items] score of each question.
        target: in a report, the reduction of image token-layers that the ratios were chosen for.
    """

    engine: EngineChoice
    result: Result
    scores: list[float]
    target: float | None = None

    @property
    def costs(self) -> tuple[float, float]:
        """Prefill FLOPs and KV tokens, as shares of unpruned."""
        assert self.result.savings is not None
        return self.result.savings.prefill_flops, self.result.savings.kv_tokens


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that no other beats in retention, prefill FLOPs and KV tokens; cheapest first."""

    def beats(other: Cell, cell: Cell) -> bool:
        ours = (-cell.result.retention.value, *cell.costs)
        theirs = (-other.result.retention.value, *other.costs)
        return all(a <= b for a, b in zip(theirs, ours, strict=True)) and theirs != ours

    front = [cell for cell in cells if not any(beats(other, cell) for other in cells)]
    return sorted(front, key=lambda cell: cell.costs)


def recommended(cells: Sequence[Cell], retain: float) -> Cell | None:
    """The cell with the fewest prefill FLOPs that keeps `retain` of the accuracy, if any does."""
    good = [cell for cell in cells if cell.result.retention.value >= retain]
    return min(good, key=lambda cell: cell.costs, default=None)


def reduction(ratio: float, layers: tuple[int, int], num_layers: int) -> float:
    """Share of image token-layers that R1 = `ratio` and R2 = 1 - (1 - R1)^2 drop.

    The paper's (0.5, 0.75) belongs to this family.
    """
    shallow, deep = layers
    middle = (deep - shallow) * ratio
    last = (num_layers - deep) * (1 - (1 - ratio) ** 3)
    return (middle + last) / num_layers


def ratios_for(target: float, layers: tuple[int, int], num_layers: int) -> Ratios | None:
    """The ratios of `reduction`'s family that reach `target`; None if the cuts are too late."""
    low, high = 0.0, _LARGEST_RATIO
    if reduction(high, layers, num_layers) < target:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        if reduction(middle, layers, num_layers) < target:
            low = middle
        else:
            high = middle
    return Ratios(round(high, 4), round(1 - (1 - high) ** 2, 4))


def report_layers(num_layers: int) -> list[tuple[int, int]]:
    """The engine's default cuts, and later ones, which save less."""
    early = default_cuts(num_layers)
    late = (max(early[0] + 1, num_layers // 4), max(early[1] + 1, num_layers // 2))
    return [layers for layers in (early, late) if layers[1] < num_layers]


def grid_layers(num_layers: int) -> list[tuple[int, int]]:
    """First cuts at an eighth to a half of the depth, second cuts an eighth or a quarter later."""
    eighth = max(1, num_layers // 8)
    return [
        (shallow, shallow + later)
        for shallow in dict.fromkeys(max(1, num_layers * i // 8) for i in (1, 2, 3, 4))
        for later in (eighth, 2 * eighth)
        if shallow + later < num_layers
    ]


GRID_RATIOS = tuple(Ratios(r1, r2) for r1 in (0.25, 0.5, 0.75, 0.9) for r2 in (0.5, 0.75, 0.9))
