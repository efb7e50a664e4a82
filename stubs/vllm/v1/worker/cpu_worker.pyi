# SPDX-License-Identifier: Apache-2.0
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

def __getattr__(name: str) -> Any: ...

class CPUWorker(Worker):
    def init_device(self) -> None: ...
