# SPDX-License-Identifier: Apache-2.0
"""The phases of the service: loading, ready, draining, failed.

The service is live from the start, and ready while the model answers. After SIGTERM it is not ready
and takes no new requests; those in flight finish within the grace time. If the engine dies, the
process ends with a non-zero status, so that its supervisor restarts it.
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Any

import uvicorn
from typing_extensions import override


class Phase(enum.Enum):
    """Phase of the service."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """The phase and the number of requests in flight. Used on the event loop's thread only."""

    def __init__(self, grace_seconds: float) -> None:
        self.phase = Phase.LOADING
        self.in_flight = 0
        self.grace_seconds = grace_seconds

    def refusal(self) -> str | None:
        """Why the service takes no requests now; None if it does."""
        return {
            Phase.LOADING: "the model is loading",
            Phase.READY: None,
            Phase.DRAINING: "the server is shutting down",
            Phase.FAILED: "the engine is dead",
        }[self.phase]

    async def drain(self) -> None:
        """Take no more requests, and wait for those in flight, at most for the grace time."""
        self.phase = Phase.DRAINING
        deadline = time.monotonic() + self.grace_seconds
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)


class GatewayServer(uvicorn.Server):
    """uvicorn that keeps its socket open while it drains, so that probes see "not ready".

    uvicorn itself stops listening at once, and ends by the signal. A second signal ends the wait.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._draining: asyncio.Task[None] | None = None

    @override
    def handle_exit(self, sig: int, frame: Any) -> None:
        """Signal handler."""
        if self._draining is not None or self._lifecycle.phase is not Phase.READY:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        await self._lifecycle.drain()
        self.should_exit = True

    def fail(self) -> None:
        """The engine is dead: answer the requests in flight, then exit."""
        self._lifecycle.phase = Phase.FAILED
        self.should_exit = True
