# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with a pruning model runner.

* `vllm.v1.worker.gpu_worker.Worker._make_model_runner` (overridden): the model runner gets another
  class. Remove when: vLLM lets an option name the class of the model runner.
* `vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model` (overridden): our kernels are compiled
  before the first request. Remove when: a `ModelState` is asked to warm up.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override
from vllm.v1.worker.gpu_worker import Worker

from himap_vllm.runner.common import make_pruning_runner
from himap_vllm.runner.v2 import PruningRunnerMixin
from himap_vllm.runner.worker import PruningWorkerMixin


class PruningGPUWorker(PruningWorkerMixin, Worker):
    """`Worker` with Model Runner V2."""

    @override
    def _make_model_runner(self) -> Any:
        runner = super()._make_model_runner()
        make_pruning_runner(runner, PruningRunnerMixin)
        return runner

    @override
    def compile_or_warm_up_model(self) -> Any:
        # Before vLLM's, which ends with watching for kernels that are compiled too late.
        self.model_runner.model_state.warm_up()
        return super().compile_or_warm_up_model()
