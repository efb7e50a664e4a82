# SPDX-License-Identifier: Apache-2.0
"""What every report is made of: spreads of repetitions, checks, Markdown tables and sections."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


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

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"

    def signed(self, digits: int) -> str:
        """As a difference."""
        low, high = (f"{value:+.{digits}f}" for value in (self.low, self.high))
        return f"{self.median:+.{digits}f} ({low} to {high})"


@dataclass(frozen=True)
class Check:
    """One claim, whether it held, and the numbers behind the verdict.

    `passed` is None if nothing could be decided; `why` then says why.
    """

    claim: str
    passed: bool | None
    found: str
    why: str = "NOT MEASURED"

    @property
    def verdict(self) -> str:
        """`PASS`, `FAIL` or `why`."""
        return self.why if self.passed is None else "PASS" if self.passed else "FAIL"


def verdicts(checks: Iterable[Check]) -> str:
    """One list item per check."""
    return "\n".join(f"- {check.verdict}: {check.claim}: {check.found}" for check in checks)


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(sections: Mapping[str, str]) -> str:
    """Title and body of each section, in Markdown."""
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())


def progress(text: str) -> None:
    """Print what happens to stderr; stdout has the tables only."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that start servers; SIGTERM, too, ends with the servers stopped."""
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "himap-bench",
        help="checkpoints, kept for the next run, and logs (default %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all checks pass")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
