# SPDX-License-Identifier: Apache-2.0
"""A test that takes its process down is one failed test, with its last words; others go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import isolated
from tests.programs import ROOT

# Plugins that these runs don't need take seconds to import.
_PYTEST = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-q"]
_ALONE = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}

_ENDED = """
import os

def test_before(): pass
def test_deadly(): os.abort()
def test_after(): pass
"""


def test_a_dead_worker_is_one_failed_test(tmp_path: Path) -> None:
    (tmp_path / "test_deadly.py").write_text(_ENDED)
    done = subprocess.run(
        [*_PYTEST, "-n", "1", "-p", "tests.workers", str(tmp_path)],
        cwd=tmp_path,
        env=_ALONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout
    assert "crashed while running 'test_deadly.py::test_deadly'" in done.stdout
    assert re.search(r"Aborted\b.*line 5 in test_deadly", done.stdout, re.DOTALL)


_GROUPED = """
import os, pytest
from pathlib import Path

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(20))
def test_together(number):
    with Path("workers").open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + chr(10))
"""


def test_a_group_stays_on_one_worker(tmp_path: Path) -> None:
    """Else each worker starts every engine."""
    (tmp_path / "test_grouped.py").write_text(_GROUPED)
    command = [*_PYTEST, "-n", "2", "--dist", "loadgroup"]
    subprocess.run(command, cwd=tmp_path, env=_ALONE, check=True, capture_output=True)
    workers = (tmp_path / "workers").read_text().split()
    assert (len(workers), len(set(workers))) == (20, 1)


def _die(word: str) -> None:
    print(word, flush=True)
    os.abort()


def test_a_dead_process_is_a_failed_call_with_its_last_words() -> None:
    assert isolated.call(os.path.join, "a", "b") == "a/b"
    with pytest.raises(AssertionError, match=r"(?s)_die ended by SIGABRT.*farewell.*in _die"):
        isolated.call(_die, "farewell")
