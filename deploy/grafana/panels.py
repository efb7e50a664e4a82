# SPDX-License-Identifier: Apache-2.0
"""What a dashboard is made of here, and the PromQL that its queries share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NAMES = re.compile(r"\b(?:himap_|vllm:|process_|job_model\w*:)[\w:]*|\bup\b|\bALERTS\b")
_QUANTILES = (0.5, 0.95, 0.99)

TARGETS = 'job=~"$job", instance=~"$instance"'
SERIES = f'{TARGETS}, model_name=~"$model"'
CRITERION = "criterion"
"""A label that only `himap_info` has."""


@dataclass(frozen=True)
class Query:
    """PromQL, and what its series are called in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        text: what it shows and how to read it; the names of its metrics are appended.
        kind: `stat` (the value now), `graph`, or `table` (the values now).
        limits: values from which a stat turns orange, then red.
        idle_only: why the panel is empty on a healthy service under load, if it is. Every other
            panel must show data there (tests/ops/test_dashboards.py).
    """

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "graph"
    width: int = 8
    limits: tuple[float, float] | None = None
    stacked: bool = False
    idle_only: str | None = None

    @property
    def metrics(self) -> list[str]:
        """Names that the queries ask Prometheus for."""
        found = (name for query in self.queries for name in _NAMES.findall(query.expr))
        return list(dict.fromkeys(found))

    @property
    def description(self) -> str:
        """Text for the reader, with the metrics at its end."""
        names = ", ".join(f"`{name}`" for name in self.metrics)
        return f"{self.text} Metric: {names}"


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard. `notes` is Markdown at its top."""

    uid: str
    title: str
    notes: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        """All panels with queries."""
        return [panel for row in self.rows for panel in row.panels]


def rate(metric: str, labels: str = "", by: Sequence[str] = ()) -> str:
    """Per-second rate of a counter that carries the model's name, summed."""
    matchers = f"{SERIES}, {labels}" if labels else SERIES
    return f"sum{_by(by)}(rate({metric}{{{matchers}}}[$__rate_interval]))"


def value(metric: str, labels: str = "") -> str:
    """A gauge that carries the model's name."""
    return f"{metric}{{{SERIES}{f', {labels}' if labels else ''}}}"


def plugin(metric: str, labels: str = "", by: Sequence[str] = (), function: str = "rate") -> str:
    """The same for a counter of the plugin, which gets the model's name from the gateway's gauge.

    The gauge is 1 under `>= bool 0` whatever its value, so the product is the counter's rate. Where
    a label of `himap_info` is asked for, this metric takes the gauge's place; it is always 1.
    """
    matchers = f"{TARGETS}, {labels}" if labels else TARGETS
    window = "$__range" if function == "increase" else "$__rate_interval"
    gauge, brought = f"(himap_requests_in_flight{{{SERIES}}} >= bool 0)", "model_name"
    if CRITERION in by:
        gauge, brought = f"himap_info{{{SERIES}}}", CRITERION
    return (
        f"sum{_by(by)}({function}({metric}{{{matchers}}}[{window}]) * on (job, instance) "
        f"group_left ({brought}) {gauge})"
    )


def ratio(part: str, whole: str) -> str:
    """Quotient with no value, instead of NaN, where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, histogram: str, labels: str = "", by: Sequence[str] = ()) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', labels, (*by, 'le'))})"


def quantiles(histogram: str, labels: str = "") -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram."""
    return tuple(Query(quantile(q, histogram, labels), f"p{round(q * 100)}") for q in _QUANTILES)


def pruned_and_not(histogram: str, qs: Sequence[float] = _QUANTILES) -> tuple[Query, ...]:
    """Quantiles of a histogram with the label `pruned`, for both of its values."""
    return tuple(
        Query(quantile(q, histogram, f'pruned="{flag}"'), f"p{round(q * 100)} {name}")
        for flag, name in (("true", "pruned"), ("false", "not pruned"))
        for q in qs
    )


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
