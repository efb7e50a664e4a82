# SPDX-License-Identifier: Apache-2.0
"""Draw a dashboard's numbers: `python -m deploy.grafana.picture --prometheus URL FILE.png`.

The picture is for docs/quickstart.md, made where no Grafana runs: a Prometheus answers the panels'
own queries, and matplotlib draws the answers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from datetime import datetime
from typing import Any

import matplotlib as mpl
import matplotlib.dates
import matplotlib.pyplot as plt

from .dashboards import DASHBOARDS
from .panels import Panel, Query

_COLUMNS = 24
_UNITS = {
    "s": lambda value: f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s",
    "percentunit": lambda value: f"{value:.1%}",
    "reqps": lambda value: f"{value:.2f} req/s",
    "suffix: x": lambda value: f"{value:.2f}x",
    "bytes": lambda value: f"{value / (1 << 20):.0f} MiB",
}
_LABELS = {"s": "seconds", "percentunit": "share", "reqps": "requests/s", "ops": "per second"}


def _ask(url: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def _expression(query: Query, window: str, minutes: float) -> str:
    values = {
        "$__rate_interval": window,
        "$__range": f"{math.ceil(minutes)}m",
        "$job": "himap",
        "$model": ".*",
        "$instance": ".*",
    }
    text = query.expr
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _legend(query: Query, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), query.legend)


def _draw_stat(axes: Any, panel: Panel, readings: list[tuple[str, float]]) -> None:
    axes.set_axis_off()
    show = _UNITS.get(panel.unit, lambda value: f"{value:g}")
    axes.text(0.5, 0.88, panel.title, ha="center", va="top", fontsize=10, color="0.35")
    for number, (name, value) in enumerate(readings or [("", math.nan)]):
        x = (number + 0.5) / max(1, len(readings))
        text = "No traffic" if math.isnan(value) else show(value)
        axes.text(x, 0.42, text, ha="center", va="center", fontsize=17, weight="bold")
        axes.text(x, 0.1, name, ha="center", va="center", fontsize=8, color="0.35")


def _draw_graph(axes: Any, panel: Panel, lines: list[tuple[str, list[Any], list[float]]]) -> None:
    axes.set_title(panel.title, fontsize=10, color="0.25")
    axes.set_ylabel(_LABELS.get(panel.unit, ""), fontsize=8)
    for name, times, values in lines:
        style = "-" if "not pruned" not in name else "--"
        axes.plot(times, values, style, linewidth=1.3, label=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    if lines:
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper left")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    else:
        axes.text(0.5, 0.5, "No traffic", ha="center", transform=axes.transAxes, color="0.5")


def draw(args: argparse.Namespace) -> None:
    """Draw rows of a dashboard, as they were in the minutes before `args.end`."""
    url, minutes, end = args.prometheus, args.minutes, args.end
    (source,) = (dashboard for dashboard in DASHBOARDS if dashboard.uid == args.dashboard)
    lines: list[list[Panel]] = [[]]
    for row in (row for row in source.rows if row.title in args.rows):
        for panel in row.panels:
            if sum(other.width for other in lines[-1]) + panel.width > _COLUMNS:
                lines.append([])
            lines[-1].append(panel)
        lines.append([])
    lines = [line for line in lines if line]
    heights = [1.0 if line[0].kind == "stat" else 2.8 for line in lines]
    figure = plt.figure(figsize=(15, sum(heights) * 1.15 + 0.6))
    figure.suptitle(source.title, fontsize=13, weight="bold")
    grid = figure.add_gridspec(
        len(lines), _COLUMNS, height_ratios=heights, hspace=0.35, wspace=2.2,
        left=0.045, right=0.99, bottom=0.05, top=0.93,
    )  # fmt: skip
    for number, line in enumerate(lines):
        left = 0
        for panel in line:
            axes = figure.add_subplot(grid[number, left : left + panel.width])
            left += panel.width
            expressions = [(q, _expression(q, args.window, minutes)) for q in panel.queries]
            if panel.kind == "stat":
                readings = [
                    (_legend(q, series["metric"]), float(series["value"][1]))
                    for q, text in expressions
                    for series in _ask(url, "query", query=text, time=end)
                ]
                _draw_stat(axes, panel, readings)
                continue
            found = []
            for q, text in expressions:
                span = {"start": end - minutes * 60, "end": end, "step": 5}
                for series in _ask(url, "query_range", query=text, **span):
                    points = [(float(t), float(v)) for t, v in series["values"]]
                    times = [datetime.fromtimestamp(t) for t, _ in points]
                    values = [value for _, value in points]
                    found.append((_legend(q, series["metric"]), times, values))
            _draw_graph(axes, panel, found)
    figure.savefig(args.file, dpi=75)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--dashboard", default="himap-overview")
    parser.add_argument("--rows", nargs="+", default=["Now", "Latency, pruned and not"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--window", default="1m", help="in the place of $__rate_interval")
    parser.add_argument("--end", type=float, default=time.time(), help="Unix time; now")
    draw(parser.parse_args())


if __name__ == "__main__":
    main()
