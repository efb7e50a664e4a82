# SPDX-License-Identifier: Apache-2.0
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

def __getattr__(name: str) -> Any: ...

class AsyncScheduler(Scheduler): ...
