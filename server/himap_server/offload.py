# SPDX-License-Identifier: Apache-2.0
"""A thread for work that holds Python's interpreter lock: JSON, base64 and traces of megabytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")

# One: such threads do not run beside each other, and the event loop would wait for each in turn.
_THREAD = ThreadPoolExecutor(1, "himap-bodies")


async def off_the_loop(work: Callable[..., _Result], *args: object) -> _Result:
    """Call `work` in that thread. The event loop waits for single calls in C only."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *args)
