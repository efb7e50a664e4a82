# SPDX-License-Identifier: Apache-2.0
"""Numbers as text: Markdown tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .client import UNPRUNED
from .results import Result
from .stats import Retention


def percent(share: float | None, digits: int = 1) -> str:
    """`0.5` as `50.0 %`; a dash for None and NaN."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def interval(value: Retention) -> str:
    """`98.1 % (97.0 to 99.2)`."""
    if math.isnan(value.value):
        return "-"
    return f"{percent(value.value)} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column aligned left and the others right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def to_json(value: Any) -> str:
    """JSON, with null for NaN."""
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def settings_table(results: Sequence[Result]) -> str:
    """A table with accuracy, savings and times, one row per setting."""
    head = [
        "ratios", "accuracy", "retention (95 %)", "same answer", "image tokens kept",
        "image token-layers", "KV tokens", "prefill FLOPs", "TTFT", "latency",
    ]  # fmt: skip
    rows = []
    for result in results:
        saved = result.savings
        rows.append([
            "unpruned" if result.ratios == UNPRUNED else str(result.ratios),
            percent(result.accuracy),
            interval(result.retention),
            percent(result.agreement),
            saved.kept if saved else "-",
            *map(percent, saved.shares if saved else [None] * 3),
            f"{1000 * result.ttft:.0f} ms",
            f"{1000 * result.latency:.0f} ms",
        ])  # fmt: skip
    return markdown_table(head, rows)


def kinds_table(results: Sequence[Result]) -> str:
    """A table of accuracy and retention per kind of question; results[0] is unpruned."""
    head = ["kind", "questions", "unpruned"]
    for result in results[1:]:
        head += [str(result.ratios), "retention (95 %)"]
    rows = []
    for kind, own in results[0].kinds.items():
        row = [kind, str(own.num_items), percent(own.accuracy)]
        for result in results[1:]:
            row += [percent(result.kinds[kind].accuracy), interval(result.kinds[kind].retention)]
        rows.append(row)
    return markdown_table(head, rows)
