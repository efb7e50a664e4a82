# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 and our Triton kernels without a GPU, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INTERPRETED = sorted(path.name for path in (ROOT / "tests" / "interpreted").glob("test_*.py"))


def run(module: str, *args: str, **environment: str) -> str:
    """Standard output of `python -m module`, which must end well."""
    result = subprocess.run(
        [sys.executable, "-m", module, *args],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(result.stdout[-20_000:], result.stderr[-5_000:])
    assert result.returncode == 0
    return result.stdout


@pytest.mark.parametrize("name", INTERPRETED)
def test_under_the_interpreter(name: str) -> None:
    output = run("pytest", "-q", f"tests/interpreted/{name}", TRITON_INTERPRET="1")
    assert " passed" in output
    assert "skipped" not in output


def test_kernels_compile_for_a_gpu() -> None:
    output = run("tests.compile_kernels")
    assert len(output.splitlines()) == 7 * 3  # kernels as called, by kinds of GPU
