# SPDX-License-Identifier: Apache-2.0
"""`himap serve` in a process of its own, for commands that bring their engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import CommandError

_START_SECONDS = 1800  # a large model may have to be downloaded
_STOP_SECONDS = 60


def engine_flags(settings: Mapping[str, object]) -> list[str]:
    """`{"shallow_layer": 2}` as `--shallow-layer 2`."""
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


@contextmanager
def serving(model: str | None, flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run `himap serve` on a free port of this machine; yields the URL of its API.

    Args:
        model: None: the bundled one.
        flags: more of its flags.
        log: where its output goes.

    Raises:
        CommandError: it ends before it is ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "himap_server.cli", "serve"),
        *([] if model is None else [model]),
        *("--host", "127.0.0.1", "--port", str(port)),
        *flags,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health/ready", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """Without what means an engine that others operate: keys would be asked for, layers mixed."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HIMAP_")}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise CommandError(
                f"himap serve ended with status {process.returncode}; the end of {log}:\n"
                + "\n".join(lines[-15:])
            )
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:  # refused, or 503: still loading
            time.sleep(0.5)
    raise CommandError(f"himap serve was not ready after {_START_SECONDS} s; see {log}")
