# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with a pruning model runner.

* `vllm.v1.worker.cpu_worker.CPUWorker.init_device` (overridden): the model runner gets another
  class. Remove when: vLLM lets an option name the class of the model runner.
"""

from __future__ import annotations

from typing_extensions import override
from vllm.v1.worker.cpu_worker import CPUWorker

from himap_vllm.runner import v1, v2
from himap_vllm.runner.common import make_pruning_runner
from himap_vllm.runner.worker import PruningWorkerMixin


class PruningCPUWorker(PruningWorkerMixin, CPUWorker):
    """`CPUWorker` with Model Runner V1, or V2 where Triton runs on the CPU (its interpreter)."""

    @override
    def init_device(self) -> None:
        super().init_device()
        runner = v2 if self.use_v2_model_runner else v1
        make_pruning_runner(self.model_runner, runner.PruningRunnerMixin)
