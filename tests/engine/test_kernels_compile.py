# SPDX-License-Identifier: Apache-2.0
"""Our Triton kernels compile for GPUs; `tests/interpreted` runs them."""

from __future__ import annotations

import subprocess
import sys

from tests.programs import ROOT


def test_kernels_compile_for_a_gpu() -> None:
    """In a process of its own, as Triton decides when it is imported what it can do."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 11 * 3  # kernels as called, by kinds of GPU
