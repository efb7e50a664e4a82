# SPDX-License-Identifier: Apache-2.0
"""Plots with matplotlib, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .stats import Retention


class PlotError(RuntimeError):
    """Plots are impossible here. The message says what to install."""


@dataclass(frozen=True, slots=True)
class Point:
    """A retention at a cost, both as shares of unpruned. An empty `label` is not drawn."""

    cost: float
    retention: Retention
    label: str = ""


def check_matplotlib() -> None:
    """Raise a PlotError if matplotlib is missing. Call it before work that ends in a plot."""
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError as error:
        raise PlotError(
            "plots need matplotlib: pip install 'himap-vllm[eval]', or use --no-plot"
        ) from error


def scatter(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    cost: str,
    joined: bool = True,
) -> None:
    """Plot retention against cost: `panels` has series by title and name."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.6), sharey=True, squeeze=False
    )
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for name, points in series.items():
            _draw(axis, name, sorted(points, key=lambda point: point.cost), joined)
        axis.axhline(100, color="0.8", linewidth=1, zorder=0)
        axis.set(title=title, xlabel=cost)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    axes[0][0].set_ylabel("retention of accuracy (%), 95 % interval")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, name: str, points: Sequence[Point], joined: bool) -> None:
    values = [100 * point.retention.value for point in points]
    errors = [
        [100 * (point.retention.value - point.retention.low) for point in points],
        [100 * (point.retention.high - point.retention.value) for point in points],
    ]
    axis.errorbar(
        [100 * point.cost for point in points],
        values,
        yerr=errors,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1,
        linestyle="-" if joined else "none",
        label=name,
    )
    for point, value in zip(points, values, strict=True):
        if point.label:
            axis.annotate(
                point.label, (100 * point.cost, value), fontsize=7,
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
