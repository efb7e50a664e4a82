# SPDX-License-Identifier: Apache-2.0
"""Everything that a run of `bench.gpu` measures, and what the device allows at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.capacity import Capacity
from bench.gpu.plan import Plan, System
from bench.model import Peaks, Work, bound_seconds
from bench.samples import Samples


@dataclass
class Results:
    """Everything measured; grows while the benchmark runs.

    Attributes:
        peaks: that the bounds use; None where there are none.
        nominal: by the data sheet; None for a device we have none of.
        peaks_measured: False: the peaks are nominal.
        samples: values and raw numbers of an `Outcome`; a load is part, text tokens, concurrency.
        scoring: `system`, `prompts` and what `Probe.scoring` returns.
        capacity: by what was filled.
        stats: the plugin's counters after the rounds.
        counted: what the functions of `counting` return, by their name.
        failures: what went wrong.
        dropped: what was left out for lack of time.
    """

    plan: Plan
    environment: dict[str, str | int]
    device: str = "unknown device"
    peaks: Peaks | None = None
    nominal: Peaks | None = None
    peaks_measured: bool = False
    samples: Samples = field(default_factory=Samples)
    scoring: list[dict[str, Any]] = field(default_factory=list)
    capacity: dict[str, Capacity] = field(default_factory=dict)
    start_seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] | None = None
    counted: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def bound_ms(self, work: Sequence[Work]) -> float | None:
        """The least time for `work` on this device."""
        return 1000 * bound_seconds(work, self.peaks) if self.peaks else None

    def prefill(self, system: System, text: int, tower: bool) -> list[Work]:
        """One prompt's."""
        return self.plan.shape.prefill(text, system.cuts(self.plan), tower)

    def saved(self, system: System, text: int, tower: bool) -> tuple[float, float | None]:
        """Stock's prefill over the system's: by FLOPs, and by the least time on this device."""
        stock, own = (self.prefill(s, text, tower) for s in (self.plan.systems[0], system))
        flops = sum(piece.flops for piece in stock) / sum(piece.flops for piece in own)
        before, after = self.bound_ms(stock), self.bound_ms(own)
        return flops, before / after if before and after else None
