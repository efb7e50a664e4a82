# SPDX-License-Identifier: Apache-2.0
"""Reports of a sweep: Markdown, JSON, plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .pareto import Cell, pareto_front, recommended
from .plot import Point, scatter
from .results import Result
from .stats import retention
from .tables import interval, markdown_table, percent, to_json

_BASELINES = ("random", "uniform")


@dataclass(frozen=True, slots=True)
class Findings:
    """A finished sweep.

    Attributes:
        about: model and data.
        reference: the unpruned result.
        cells: the settings.
        groups: [num_items] the bootstrap's group of each question.
        retain: share of the accuracy that the recommended setting keeps.
    """

    about: dict[str, Any]
    reference: Result
    cells: list[Cell]
    groups: list[str]
    retain: float


def write_grid(folder: Path, findings: Findings, draw: bool) -> str:
    """Write a grid's Pareto front and recommended setting; returns the text for the terminal."""
    cells = findings.cells
    front = pareto_front(cells)
    lines = [
        "# Where to prune",
        _intro(findings),
        _recommendation(findings, folder),
        "## Pareto front: retention, prefill FLOPs, KV tokens",
        _cells_table(front),
    ]
    shown = "\n\n".join(lines[2:])
    if draw:
        panels = {}
        for index, title in enumerate(("prefill FLOPs", "KV tokens")):
            panels[title] = {
                "settings": [_point(cell, index) for cell in cells if cell not in front],
                "Pareto front": [_point(cell, index, labelled=True) for cell in front],
            }
        scatter(folder / "sweep.png", panels, "% of unpruned", joined=False)
        lines.append("![Retention against cost](sweep.png)")
    lines += ["## All settings", _cells_table(sorted(cells, key=lambda cell: cell.costs))]
    _write(folder, "sweep", findings, lines)
    return shown


def write_report(folder: Path, findings: Findings, draw: bool) -> str:
    """Write a comparison of criteria at equal budgets; returns the text for the terminal."""
    cells = findings.cells
    lines = [
        "# Criteria at equal budgets",
        _intro(findings),
        "Retention of accuracy at an average reduction of image token-layers (image tokens summed "
        "over the layers), with a 95 % interval (paired bootstrap over groups). A column has one "
        "pair of ratios, R2 = 1 - (1 - R1)^2, of which the paper's (0.5, 0.75) is one.",
    ]
    panels: dict[str, dict[str, list[Point]]] = {}
    pairs = list(dict.fromkeys(cell.engine.layers for cell in cells))
    for layers in pairs:
        own = [cell for cell in cells if cell.engine.layers == layers]
        lines += [
            f"## {layers}",
            _criteria_table(own),
            *(_against(name, own, findings.groups) for name in _BASELINES),
            _kinds_tables(own, findings.reference),
        ]
        panels[layers] = {}
        for cell in own:
            assert cell.result.savings is not None
            point = Point(1 - cell.result.savings.image_token_layers, cell.result.retention)
            panels[layers].setdefault(cell.engine.criterion, []).append(point)
    if draw:
        scatter(folder / "report.png", panels, "reduction of image token-layers (%)")
        lines.append("![Retention against reduction](report.png)")
    lines.append(_recommendation(findings, folder))
    _write(folder, "report", findings, lines)
    return "\n\n".join(lines[3:])


def _intro(findings: Findings) -> str:
    about, reference = findings.about, findings.reference
    kinds = ", ".join(
        f"{kind} {percent(own.accuracy)} of {own.num_items}"
        for kind, own in reference.kinds.items()
    )
    return (
        f"{about['model']}; {about['data']}: {about['num_questions']} questions in "
        f"{about['num_groups']} groups. Unpruned accuracy {percent(reference.accuracy)} ({kinds})."
    )


def _recommendation(findings: Findings, folder: Path) -> str:
    """The recommended setting in words; also writes it to a file, as engine settings."""
    cells, retain = findings.cells, findings.retain
    best = recommended(cells, retain)
    if best is None:
        top = max(cells, key=lambda cell: cell.result.retention.value)
        return (
            f"No setting keeps {percent(retain, 0)} of the accuracy; the most is "
            f"{interval(top.result.retention)}, with {_name(top)}."
        )
    saved = best.result.savings
    assert saved is not None
    settings = {
        "shallow_layer": best.engine.shallow_layer,
        "deep_layer": best.engine.deep_layer,
        "shallow_ratio": best.result.ratios.shallow,
        "deep_ratio": best.result.ratios.deep,
        "criterion": best.engine.criterion,
    }
    (folder / "recommended.json").write_text(json.dumps(settings, indent=2) + "\n")
    return (
        f"**Recommended** (fewest prefill FLOPs that keep {percent(retain, 0)}): {_name(best)}: "
        f"retention {interval(best.result.retention)}, "
        f"{percent(1 - saved.image_token_layers)} of the image token-layers dropped, "
        f"{percent(saved.kv_tokens)} of the KV tokens and {percent(saved.prefill_flops)} of the "
        "prefill FLOPs left."
    )


def _name(cell: Cell) -> str:
    return f"{cell.engine.criterion}, {cell.engine.layers}, R = {cell.result.ratios}"


def _point(cell: Cell, cost: int, labelled: bool = False) -> Point:
    engine, ratios = cell.engine, cell.result.ratios
    label = f"{engine.shallow_layer},{engine.deep_layer}; {ratios.shallow:g},{ratios.deep:g}"
    return Point(cell.costs[cost], cell.result.retention, label if labelled else "")


def _cells_table(cells: Sequence[Cell]) -> str:
    head = [
        "criterion", "K1, K2", "R1, R2", "accuracy", "retention (95 %)", "same answer",
        "image token-layers", "KV tokens", "prefill FLOPs",
    ]  # fmt: skip
    rows = []
    for cell in cells:
        result, engine = cell.result, cell.engine
        assert result.savings is not None
        rows.append([
            engine.criterion,
            f"{engine.shallow_layer}, {engine.deep_layer}",
            f"{result.ratios.shallow:g}, {result.ratios.deep:g}",
            percent(result.accuracy),
            interval(result.retention),
            percent(result.agreement),
            *map(percent, result.savings.shares),
        ])  # fmt: skip
    return markdown_table(head, rows)


def _rows(cells: Sequence[Cell]) -> dict[float, dict[str, Cell]]:
    """Cells by target reduction and criterion."""
    rows: dict[float, dict[str, Cell]] = {}
    for cell in cells:
        assert cell.target is not None
        rows.setdefault(cell.target, {})[cell.engine.criterion] = cell
    return rows


def _heads(cells: Sequence[Cell]) -> list[str]:
    """Each reduction, as reached."""
    heads = []
    for own in _rows(cells).values():
        some = next(iter(own.values())).result
        assert some.savings is not None
        heads.append(f"{percent(1 - some.savings.image_token_layers)}, R = {some.ratios}")
    return heads


def _criteria_table(cells: Sequence[Cell]) -> str:
    criteria = list(dict.fromkeys(cell.engine.criterion for cell in cells))
    rows = [
        [name, *(interval(own[name].result.retention) for own in _rows(cells).values())]
        for name in criteria
    ]
    return markdown_table(["criterion", *_heads(cells)], rows)


def _against(baseline: str, cells: Sequence[Cell], groups: Sequence[str]) -> str:
    """A table of each criterion's accuracy as a share of the baseline's."""
    criteria = list(dict.fromkeys(cell.engine.criterion for cell in cells))
    if baseline not in criteria:
        return ""
    rows, verdicts = [], []
    for name in criteria:
        if name == baseline:
            continue
        ratios = [
            retention(own[name].scores, own[baseline].scores, groups)
            for own in _rows(cells).values()
        ]
        rows.append([name, *map(interval, ratios)])
        better, worse = sum(r.low > 1 for r in ratios), sum(r.high < 1 for r in ratios)
        same = len(ratios) - better - worse
        verdicts.append(f"{name}: better in {better}, no different in {same}, worse in {worse}")
    table = markdown_table(["criterion", *_heads(cells)], rows)
    return (
        f"Accuracy as a share of that of `{baseline}` (an interval that has 100 in it: no "
        f"different):\n\n{table}\n\nOf {len(_heads(cells))} reductions, {'; '.join(verdicts)}."
    )


def _kinds_tables(cells: Sequence[Cell], reference: Result) -> str:
    """Of each reduction, what share of each kind of question is answered right."""
    parts = []
    for head, own in zip(_heads(cells), _rows(cells).values(), strict=True):
        results = {"unpruned": reference} | {name: cell.result for name, cell in own.items()}
        rows = [
            [name, *(percent(kind.accuracy, 0) for kind in result.kinds.values())]
            for name, result in results.items()
        ]
        table = markdown_table(["criterion", *reference.kinds], rows)
        parts.append(f"Right answers by kind, {head}:\n\n{table}")
    return "\n\n".join(parts)


def _write(folder: Path, name: str, findings: Findings, lines: Sequence[str]) -> None:
    (folder / f"{name}.md").write_text("\n\n".join(filter(None, lines)) + "\n")
    values = {
        **findings.about,
        "unpruned": findings.reference.as_dict(),
        "cells": [
            {**asdict(cell.engine), **cell.result.as_dict(), "target": cell.target}
            for cell in findings.cells
        ],
    }
    (folder / f"{name}.json").write_text(to_json(values))
