# SPDX-License-Identifier: Apache-2.0
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

def __getattr__(name: str) -> Any: ...

class Worker(WorkerBase):
    model_runner: Any
    use_v2_model_runner: bool

    def init_device(self) -> None: ...
    def _make_model_runner(self) -> GPUModelRunner: ...
    def compile_or_warm_up_model(self) -> CompilationTimes: ...
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None: ...
