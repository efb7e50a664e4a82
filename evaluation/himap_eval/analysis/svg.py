# SPDX-License-Identifier: Apache-2.0
"""Line charts and heat maps as inline SVG, which a page shows without scripts.

Colours come from the page's style sheet, so that they suit a light and a dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_TICKS = 4
_LITTLE = 0.01  # below zero, as a share of the axis: rounding

STYLE = """\
svg { width: 100%; max-width: 640px; height: auto; font: 12px sans-serif; fill: currentColor; }
svg .grid { stroke: currentColor; opacity: 0.15; }
svg .mark { stroke: currentColor; stroke-dasharray: 4 3; opacity: 0.6; }
svg .line { fill: none; stroke-width: 2; }
svg .c0 { stroke: #0072b2; } svg .c1 { stroke: #d55e00; }
svg .c2 { stroke: #009e73; } svg .c3 { stroke: #cc79a7; }
svg .cell { fill: #0072b2; }
"""


def line_chart(
    title: str,
    series: Mapping[str, Sequence[float | None]],
    y_label: str,
    places: Sequence[float] | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Lines over the layers.

    Args:
        title: read out by screen readers.
        series: at most four, by name.
        y_label: of the vertical axis.
        places: layer of each point (default: 0, 1, ...).
        marks: vertical lines, by name.
    """
    points = list(next(iter(series.values())))
    xs = list(range(len(points))) if places is None else list(places)
    known = [value for line in series.values() for value in line if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    high = high if high > low else low + 1
    low = 0.0 if low > -_LITTLE * high else low
    parts = [_frame(low, high, xs, y_label)]
    for name, place in (marks or {}).items():
        x = _x(place, xs)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_bottom()}"/>')
        parts.append(f'<text x="{x + 3}" y="{_TOP + 10}">{escape(name)}</text>')
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(
            f"{_x(x, xs)},{_y(value, low, high)}"
            for x, value in zip(xs, line, strict=True)
            if value is not None
        )
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
        x, y = _LEFT + 8 + number * 145, _HEIGHT - 4
        parts.append(
            f'<line class="line c{number}" x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}"/>'
        )
        parts.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    return _svg(title, parts)


def heat_map(title: str, rows: Sequence[Sequence[float]], x_label: str) -> str:
    """A row of cells for each layer, layer 0 on top; the darker, the higher."""
    values = np.asarray(rows)
    shares = values / max(values.max(), 1e-12)
    width = (_WIDTH - _LEFT - _RIGHT) / values.shape[1]
    height = (_bottom() - _TOP) / len(values)
    parts = []
    for row, line in enumerate(shares):
        y = _TOP + row * height
        if row % max(1, len(values) // 8) == 0:
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{row}</text>'
            )
        parts += [
            f'<rect class="cell" x="{_LEFT + column * width:.1f}" y="{y:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}" opacity="{share:.2f}"/>'
            for column, share in enumerate(line)
        ]
    parts.append(f'<text x="{_LEFT}" y="{_bottom() + 16}">{escape(x_label)}</text>')
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    inner = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        f"{inner}\n</svg>"
    )


def _frame(low: float, high: float, xs: Sequence[float], y_label: str) -> str:
    parts = [f'<text x="4" y="{_TOP}" >{escape(y_label)}</text>']
    for tick in range(_TICKS + 1):
        value = low + (high - low) * tick / _TICKS
        y = _y(value, low, high)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for x in xs[:: max(1, len(xs) // 12)]:
        parts.append(
            f'<text x="{_x(x, xs)}" y="{_bottom() + 14}" text-anchor="middle">{x:g}</text>'
        )
    return "\n".join(parts)


def _bottom() -> int:
    return _HEIGHT - _BOTTOM


def _x(place: float, xs: Sequence[float]) -> float:
    span = max(xs[-1] - xs[0], 1e-9)
    return round(_LEFT + (place - xs[0]) / span * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(value: float, low: float, high: float) -> float:
    return round(_bottom() - (value - low) / (high - low) * (_bottom() - _TOP - 8), 1)
