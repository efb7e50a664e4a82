# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with a pruning model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from himap_vllm.runner import v1, v2
from himap_vllm.runner.worker import PruningWorkerMixin


class PruningCPUWorker(PruningWorkerMixin, CPUWorker):
    """`CPUWorker` with Model Runner V1, or V2 where Triton runs on the CPU (its interpreter)."""

    def init_device(self) -> None:
        super().init_device()
        (v2 if self.use_v2_model_runner else v1).adopt(self.model_runner)
