# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own, for engines that may take their process down.

A kernel for a processor that nobody has tried may abort. Then one test fails, with what the
process said last.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests.environment  # noqa: F401

ROOT = Path(__file__).parents[1]
_SECONDS = 600
_TAIL = 6000  # characters


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        status: exit status of the process; minus the signal's number if one ended it.
        value: what the call returned, if the status is 0.
        words: what the process printed, the end of it.
    """

    status: int
    value: Any
    words: str

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the process, if one did."""
        return signal.Signals(-self.status).name if self.status < 0 else None


def attempt(function: Callable[..., Any], *arguments: Any, **environment: str) -> Outcome:
    """Call a function of a module, with arguments and a result that can be pickled."""
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")
        call.write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "tests.isolated", call, answer],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
        )
        value = pickle.loads(answer.read_bytes()) if done.returncode == 0 else None
    return Outcome(done.returncode, value, done.stdout.decode(errors="replace")[-_TAIL:])


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returned; fails with the process's last words if it died."""
    outcome = attempt(function, *arguments)
    ended = outcome.signal or f"exit status {outcome.status}"
    assert outcome.status == 0, f"{function.__name__} ended by {ended}:\n{outcome.words}"
    return outcome.value


def _serve(call: Path, answer: Path) -> None:
    module, name, arguments = pickle.loads(call.read_bytes())
    function = getattr(importlib.import_module(module), name)
    answer.write_bytes(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
