# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 and our Triton kernels without a GPU, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    return result.stdout


@pytest.fixture(scope="module")
def outputs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """Of the modules that were asked for, two at a time: the interpreter keeps one core busy."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(
                run, "pytest", "-q", f"tests/interpreted/{name}", TRITON_INTERPRET="1"
            )
            for name in INTERPRETED
            if {"name": name} in params
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", INTERPRETED)
def test_under_the_interpreter(outputs: dict[str, Future[str]], name: str) -> None:
    output = outputs[name].result()
    assert " passed" in output
    assert "skipped" not in output


def test_kernels_compile_for_a_gpu() -> None:
    output = run("tests.compile_kernels")
    assert len(output.splitlines()) == 7 * 3  # kernels as called, by kinds of GPU
