# SPDX-License-Identifier: Apache-2.0
"""An object in a process of its own: an engine that breaks takes nothing else with it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STOP_SECONDS = 10.0


class WorkerError(RuntimeError):
    """The object raised, its process ended, or it took too long."""


class Worker:
    """Calls methods of `factory(*arguments)`, which lives in a process group of its own.

    The object has a method `close`, which is called at the end.

    Coroutine methods run in one event loop, which stands still between calls.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *arguments: Any,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Start the process; what it does first is build the object.

        Args:
            factory: importable, and its module without vLLM at the top: the environment is set
                after that module is imported.
            arguments: picklable.
            log: gets everything that the process prints.
            environment: variables to set.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.log = log
        self._process = context.Process(
            target=_serve, args=(theirs, factory, arguments, log, dict(environment))
        )
        self._process.start()
        theirs.close()
        self._broken = False
        self._waiting = False

    def send(self, method: str, *arguments: Any) -> None:
        """Ask for a call; `receive` gets the answer."""
        if self._broken:
            raise WorkerError(f"gone since an earlier failure; see {self.log}")
        try:
            self._connection.send((method, arguments))
            self._waiting = True
        except OSError as error:
            self._broken = True
            raise WorkerError(f"ended; see {self.log}: {_tail(self.log)}") from error

    def receive(self, timeout: float) -> Any:
        """The answer to the oldest call that has had none.

        Raises:
            WorkerError: the call raised; or, and then for good, there is no answer.
        """
        try:
            if not self._connection.poll(max(timeout, 0.0)):
                self._broken = True
                raise WorkerError(f"no answer in {timeout:.0f} s; see {self.log}")
            answer, failure = self._connection.recv()
            self._waiting = False
        except (EOFError, OSError) as error:
            self._broken = True
            raise WorkerError(f"ended; see {self.log}: {_tail(self.log)}") from error
        if failure:
            raise WorkerError(failure)
        return answer

    def call(self, timeout: float, method: str, *arguments: Any) -> Any:
        """`send` and `receive`."""
        self.send(method, *arguments)
        return self.receive(timeout)

    def stop(self) -> None:
        """End the process and all that it started."""
        self._broken = True
        self._connection.close()
        # One that is still in a call hears nothing.
        self._process.join(0 if self._waiting else STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()  # before it has a group of its own
        self._process.join(STOP_SECONDS)


def _tail(log: Path, lines: int = 5) -> str:
    with contextlib.suppress(OSError):
        return " / ".join(log.read_text(errors="replace").splitlines()[-lines:])[-600:]
    return ""


def _serve(
    connection: Connection,
    factory: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path,
    environment: dict[str, str],
) -> None:
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    instance = None
    while True:
        try:
            method, parameters = connection.recv()
        except EOFError:
            if instance is not None:
                instance.close()
            return
        try:
            if instance is None:
                instance = factory(*arguments)
            answer = getattr(instance, method)(*parameters)
            if inspect.isawaitable(answer):
                answer = loop.run_until_complete(answer)
            connection.send((answer, None))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {error}"[:1000]))
