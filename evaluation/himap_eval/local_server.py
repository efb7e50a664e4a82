# SPDX-License-Identifier: Apache-2.0
"""The one launcher of servers: commands, benchmarks, tests and examples start theirs here."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from .errors import CommandError

_START_SECONDS = 1800  # a large model may have to be downloaded
_STOP_SECONDS = 60
_LOG_LINES = 30


@dataclass
class LocalServer:
    """A running server process.

    Attributes:
        process: the process that answers HTTP; an engine runs in its children.
        url: scheme, host and port.
        log: where its output goes; None: to this process's own output.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path | None = None

    def status(self, path: str) -> int:
        """HTTP status of a GET; 0 if nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_for(self, path: str, seconds: float = 300) -> None:
        """Wait until a GET answers 200.

        Raises:
            CommandError: the process ended, or `seconds` have passed.
        """
        command = subprocess.list2cmdline(self.process.args)  # type: ignore[arg-type]
        deadline = time.monotonic() + seconds
        while self.status(path) != 200:  # refused, or 503: the model is loading
            if self.process.poll() is not None:
                ended = f"{command} ended with status {self.process.returncode}"
                raise CommandError(ended + self._end_of_log())
            if time.monotonic() > deadline:
                raise CommandError(f"{command} was not ready after {seconds} s; log: {self.log}")
            time.sleep(0.5)

    def _end_of_log(self) -> str:
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"; the end of {self.log}:\n" + "\n".join(lines[-_LOG_LINES:])


@contextlib.contextmanager
def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None = None,
    *,
    own_session: bool = False,
) -> Iterator[LocalServer]:
    """Run a server on a free loopback port; stop it and its children at the end.

    Args:
        command: takes `--host` and `--port`.
        environment: all of its environment variables.
        log: where its output goes; None: to this process's own output.
        own_session: keep Ctrl-C in a terminal from reaching the server.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = None if log is None else log.open("wb")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=own_session,
    )
    try:
        yield LocalServer(process, f"http://127.0.0.1:{port}", log)
    finally:
        _stop(process)
        if output is not None:
            output.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end; kill what is left of it and of its children."""
    children: list[psutil.Process] = []
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def serving(model: str | None, flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run `himap serve` until it is ready; yields the URL of its API.

    Args:
        model: a path or a name on the hub; None: the bundled model.
        flags: more of its flags.
        log: where its output goes.

    Raises:
        CommandError: it ends before it is ready.
    """
    command = [
        *(sys.executable, "-m", "himap_server.cli", "serve"),
        *([] if model is None else [model]),
        *flags,
    ]
    # HIMAP_* are of an engine that others operate: its keys would be asked for, its layers used.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("HIMAP_")}
    with launch(command, environment, log) as server:
        server.wait_for("/health/ready", _START_SECONDS)
        yield f"{server.url}/v1"


def engine_flags(settings: Mapping[str, object]) -> list[str]:
    """`{"shallow_layer": 2}` as `--shallow-layer 2`."""
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
