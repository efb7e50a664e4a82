# SPDX-License-Identifier: Apache-2.0
"""Everything that a run of `bench.gpu` measures, and numbers read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.capacity import Capacity
from bench.gpu.engine import Outcome
from bench.gpu.plan import Cell, Plan
from bench.model import Peaks, Work, bound_seconds

Metric = Callable[[Outcome], float | None]


@dataclass
class Results:
    """Everything measured; grows while the benchmark runs.

    Attributes:
        peaks: that the bounds use; None where there are none.
        nominal: by the data sheet; None for a device we have none of.
        peaks_measured: False: the peaks are nominal.
        outcomes: with their cells, repetitions included.
        scoring: `system`, `prompts` and what `Probe.scoring` returns.
        capacity: by what was filled.
        stats: the plugin's counters after the rounds.
        counted: answers of the parts of `Counting`, by their name.
        failures: what went wrong.
        dropped: what was left out for lack of time.
    """

    plan: Plan
    environment: dict[str, str | int]
    device: str = "unknown device"
    peaks: Peaks | None = None
    nominal: Peaks | None = None
    peaks_measured: bool = False
    outcomes: list[tuple[Cell, Outcome]] = field(default_factory=list)
    scoring: list[dict[str, Any]] = field(default_factory=list)
    capacity: dict[str, Capacity] = field(default_factory=dict)
    start_seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] | None = None
    counted: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep one outcome."""
        self.outcomes.append((cell, outcome))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        outcomes = [{**asdict(cell), "outcome": asdict(found)} for cell, found in self.outcomes]
        return {
            **{name: value for name, value in vars(self).items() if name != "outcomes"},
            "plan": asdict(self.plan),
            "peaks": self.peaks and asdict(self.peaks),
            "nominal": self.nominal and asdict(self.nominal),
            "capacity": {name: asdict(found) for name, found in self.capacity.items()},
            "outcomes": outcomes,
        }

    def of(self, *key: Any) -> dict[int, Outcome]:
        """By round, the repetitions of the cells `key`."""
        return {cell.round_index: outcome for cell, outcome in self.outcomes if cell.key == key}

    def values(self, metric: Metric, *key: Any) -> dict[int, float]:
        """By round, of those that have one."""
        found = {index: metric(outcome) for index, outcome in self.of(*key).items()}
        return {index: value for index, value in found.items() if value is not None}

    def value(self, metric: Metric, *key: Any) -> float | None:
        """Median over the rounds; None if there is none."""
        values = self.values(metric, *key)
        return median(values.values()) if values else None

    def bound_ms(self, work: Sequence[Work]) -> float | None:
        """The least time for `work` on this device."""
        return 1000 * bound_seconds(work, self.peaks) if self.peaks else None


def ttft_ms(outcome: Outcome) -> float:
    """Median time to first token, as the client sees it."""
    return median(outcome.ttft_ms)


def prefill_ms(outcome: Outcome) -> float:
    """Median time to first token inside the engine core."""
    return median(outcome.prefill_ms)


def step_ms(outcome: Outcome) -> float | None:
    """Time per token while nothing is prefilled."""
    return outcome.step_ms


def requests_per_second(outcome: Outcome) -> float:
    """Throughput."""
    return len(outcome.ttft_ms) / outcome.seconds


def p99(values: Sequence[float]) -> float:
    """The value that 99 % don't exceed: of fewer than 100, the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)]
