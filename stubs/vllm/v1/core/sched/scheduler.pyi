# SPDX-License-Identifier: Apache-2.0
from typing import Any

from vllm.config import SchedulerConfig, VllmConfig
from vllm.multimodal import MultiModalRegistry
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

def __getattr__(name: str) -> Any: ...

class Scheduler:
    vllm_config: VllmConfig
    scheduler_config: SchedulerConfig
    max_num_scheduled_tokens: int
    num_spec_tokens: int
    use_v2_model_runner: bool
    hash_block_size: int
    requests: dict[str, Request]
    running: list[Request]
    encoder_cache_manager: EncoderCacheManager
    kv_cache_manager: KVCacheManager

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        structured_output_manager: StructuredOutputManager,
        block_size: int,
        hash_block_size: int | None = None,
        mm_registry: MultiModalRegistry = ...,
        include_finished_set: bool = False,
        log_stats: bool = False,
    ) -> None: ...
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput: ...
    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]: ...
    def add_request(self, request: Request) -> None: ...
    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]: ...
