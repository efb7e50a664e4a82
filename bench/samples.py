# SPDX-License-Identifier: Apache-2.0
"""Systems side by side, round by round: what was measured, and how the rounds compare."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

STOCK, UNPRUNED, PRUNED = "stock", "himap, ratios 0", "himap, pruned"
T = TypeVar("T")


def turns(systems: Sequence[T], round_index: int) -> list[T]:
    """The order of a round: systems take turns at being first."""
    first = round_index % len(systems)
    return [*systems[first:], *systems[:first]]


@dataclass(frozen=True)
class Spread:
    """Median of several rounds' values, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per round."""
        return cls(median(values), min(values), max(values))

    def show(self, form: str = ".3f") -> str:
        """Each number as `form` says."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Sample:
    """One load on one system.

    Attributes:
        load: what was done; of one load and round, all systems had the same requests.
        values: by metric; a metric that does not apply is left out.
        raw: what the values come from, JSON-ready or a dataclass.
    """

    load: Hashable
    system: str
    round_index: int
    values: Mapping[str, float]
    raw: Any = None


class Samples(list[Sample]):
    """Everything measured."""

    def loads(self) -> list[Any]:
        """In the order of the first round."""
        return list(dict.fromkeys(sample.load for sample in self))

    def rounds(self, metric: str, load: Hashable, system: str) -> dict[int, float]:
        """Value by round; empty where the metric does not apply."""
        return {
            sample.round_index: sample.values[metric]
            for sample in self
            if (sample.load, sample.system) == (load, system) and metric in sample.values
        }

    def median(self, metric: str, load: Hashable, system: str) -> float | None:
        """Over the rounds; None if there is none."""
        values = self.rounds(metric, load, system)
        return median(values.values()) if values else None

    def compare(
        self,
        metric: str,
        load: Hashable,
        system: str,
        base: str,
        how: Callable[[float, float], float] = operator.truediv,
    ) -> Spread:
        """`system` over (or by `how` against) `base`, within each round that both have.

        Raises:
            StatisticsError: there is no such round.
        """
        own, other = (self.rounds(metric, load, name) for name in (system, base))
        return Spread.of([how(own[index], other[index]) for index in own if index in other])
