# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: markers by folder, tests shared out to workers, last words of a dead worker."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
_FOLDER = pytest.StashKey[Path]()
_FILE = pytest.StashKey[Any]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its room; tests of a file share engines, so they share a worker.

    `xdist_group` on a test says otherwise. Tests of `unit` share nothing.
    """
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        room = item.path.relative_to(TESTS).parts[0]
        item.add_marker(room)
        if room != "unit" and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(room if room == "ops" else item.path.stem))


@pytest.hookimpl(trylast=True)  # after pytest's own, which takes faults to the terminal
def pytest_configure(config: pytest.Config) -> None:
    """Let workers write to a file where they are when a signal ends them."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.stash[_FILE] = open(Path(worker["himap_faults"]) / worker["workerid"], "w")  # noqa: SIM115
        faulthandler.enable(config.stash[_FILE])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker the folder of these files; called where the workers are started."""
    if _FOLDER not in node.config.stash:
        node.config.stash[_FOLDER] = Path(tempfile.mkdtemp(prefix="himap-faults-"))
    node.workerinput["himap_faults"] = str(node.config.stash[_FOLDER])


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: Any, sched: Any) -> None:
    """Show them in the failed test's report."""
    file = sched.config.stash[_FOLDER] / report.node.gateway.id
    words = file.read_text() if file.exists() else ""
    report.longrepr = f"{report.longrepr}\n{words or 'It was killed, or ended itself.'}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the files."""
    folder = config.stash.get(_FOLDER, None)
    if folder is not None:
        for file in folder.iterdir():
            file.unlink()
        os.rmdir(folder)
