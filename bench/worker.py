# SPDX-License-Identifier: Apache-2.0
"""An object in a process of its own: if an engine breaks, nothing else breaks with it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """The object raised, its process ended, or it took too long."""


class Worker:
    """Calls methods of `factory(*arguments)`, which lives in a process group of its own.

    Coroutine methods run in one event loop, which stands still between calls.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *arguments: Any,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Start the process; its first call builds the object.

        Args:
            factory: importable; unpickled after the environment is set.
            arguments: picklable.
            log: gets everything that the process prints.
            environment: variables to set.
        """
        self.log = log
        self._factory, self._arguments = factory, arguments
        self._gone = False
        self._pool = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_enter,
            initargs=(log, dict(environment)),
        )
        self._pid = self._pool.submit(os.getpid)

    def call(self, timeout: float, method: str, *arguments: Any) -> Any:
        """What the method returns.

        Raises:
            WorkerError: it raised; or, and then for good, there was no answer in `timeout` seconds.
        """
        if self._gone:
            raise WorkerError(f"gone since an earlier failure; see {self.log}")
        call = self._pool.submit(_call, self._factory, self._arguments, method, arguments)
        try:
            return call.result(max(timeout, 0.0))
        except BrokenExecutor as error:
            self._gone = True
            raise WorkerError(f"ended; see {self.log}: {_tail(self.log)}") from error
        except TimeoutError as error:
            self._gone = not call.done()  # else the method itself raised it
            text = f"no answer in {timeout:.0f} s; see {self.log}" if self._gone else repr(error)
            raise WorkerError(text) from error
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}"[:1000]) from error

    def stop(self) -> None:
        """End the process and all that it started; an idle object is closed first."""
        if not self._gone and self._pid.done():
            with contextlib.suppress(WorkerError):
                self.call(10.0, "close")
        self._gone = True
        if self._pid.done() and not self._pid.exception():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _tail(log: Path, lines: int = 5) -> str:
    with contextlib.suppress(OSError):
        return " / ".join(log.read_text(errors="replace").splitlines()[-lines:])[-600:]
    return ""


# In the worker's process


def _enter(log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.set_event_loop(asyncio.new_event_loop())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


_built: list[Any] = []


def _call(
    factory: Callable[..., Any], arguments: tuple[Any, ...], method: str, parameters: Any
) -> Any:
    try:
        if not _built:
            _built.append(factory(*arguments))
        answer = getattr(_built[0], method)(*parameters)
        if inspect.isawaitable(answer):
            answer = asyncio.get_event_loop().run_until_complete(answer)
    except Exception:
        traceback.print_exc()
        raise
    return answer
