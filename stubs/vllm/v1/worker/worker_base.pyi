# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

from torch import nn
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

def __getattr__(name: str) -> Any: ...

class CompilationTimes(NamedTuple):
    language_model: float
    encoder: float

class WorkerBase:
    model_runner: nn.Module | None

    def compile_or_warm_up_model(self) -> CompilationTimes: ...
    def init_device(self) -> None: ...
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None: ...
