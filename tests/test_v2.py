# SPDX-License-Identifier: Apache-2.0
"""Runs `tests/interpreted`: Model Runner V2 and our Triton kernels, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in DIRECTORY.glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", str(DIRECTORY / name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=DIRECTORY.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(result.stdout[-20_000:], result.stderr[-5_000:])
    assert result.returncode == 0
    assert "skipped" not in result.stdout.splitlines()[-1]
