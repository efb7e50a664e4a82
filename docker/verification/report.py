# SPDX-License-Identifier: Apache-2.0
"""One line per check, as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable

from .tools import VerificationError


class Report:
    """Runs checks and counts those that fail."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0

    def step(self, name: str, work: Callable[[], str]) -> None:
        """Run what the later checks need; prints how long it took and what it returned.

        Raises:
            VerificationError: what `work` raised.
        """
        started = time.monotonic()
        detail = work()
        print(f"     {time.monotonic() - started:4.0f} s  {name}: {detail}", flush=True)

    def check(self, name: str, look: Callable[[], str]) -> None:
        """Run one check; it fails by an exception, also by one of an answer that is malformed."""
        started = time.monotonic()
        try:
            outcome, detail = "ok  ", look()
            self.passed += 1
        except (VerificationError, OSError, LookupError, ValueError) as error:
            outcome, detail = "FAIL", str(error) or type(error).__name__
            self.failed += 1
        print(f"{outcome} {time.monotonic() - started:4.0f} s  {name}: {detail}", flush=True)


def expect(condition: bool, message: str) -> None:
    """Raise `VerificationError` with the message unless the condition holds."""
    if not condition:
        raise VerificationError(message)
