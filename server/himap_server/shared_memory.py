# SPDX-License-Identifier: Apache-2.0
"""Refuse to start where `/dev/shm` cannot hold a queue between the engine core and its workers.

Containers get 64 MB of it unless told otherwise. vLLM finds out late, in a child process. Both ask
only whether each queue fits while the others are empty. Queues that do not all fit when they are
full are a warning: one that cannot be filled ends a worker by SIGBUS.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.logger import init_logger

logger = init_logger("vllm.himap.server")

_SHM = Path("/dev/shm")


class SharedMemoryError(Exception):
    """`/dev/shm` is too small for the engine."""


def check_shared_memory(config: VllmConfig, shm: Path = _SHM) -> None:
    """Check that `shm` has room for all queues of the engines that this process starts.

    * `vllm.distributed.device_communicators.shm_broadcast.MessageQueue.__init__`,
      `vllm.envs.VLLM_MQ_MAX_CHUNK_BYTES_MB` (read): a queue is as large as its number of chunks
      times the size of one. For the queue to the workers that size comes from the environment, for
      each worker's queue back it is the default. Remove when: vLLM checks `/dev/shm` for all queues
      before it starts workers.

    Raises:
        SharedMemoryError: with the number of MiB that are missing, and what to do.
    """
    queues = _queue_bytes(config)
    if not queues or not shm.is_dir():
        return
    free, needed = shutil.disk_usage(shm).free, sum(queues)
    if free >= needed:
        return
    message = (
        f"{shm} has {free >> 20} MiB free, the engine's queues need {needed >> 20} MiB: give"
        f" the container more (docker run --shm-size {-(-needed >> 30)}g; compose: shm_size;"
        " Kubernetes: an emptyDir of medium Memory)"
    )
    if free < max(queues):
        raise SharedMemoryError(message)
    logger.warning("%s", message)


def _queue_bytes(config: VllmConfig) -> list[int]:
    """Size of each queue of the engines that this process starts."""
    parallel = config.parallel_config
    if parallel.distributed_executor_backend != "mp":
        return []  # the worker lives in the engine core's process
    defaults = inspect.signature(MessageQueue.__init__).parameters
    chunks, chunk_bytes = (
        int(defaults[name].default) for name in ("max_chunks", "max_chunk_bytes")
    )
    to_workers = chunks * (int(envs.VLLM_MQ_MAX_CHUNK_BYTES_MB) << 20)
    from_workers = [chunks * chunk_bytes] * int(parallel.local_world_size)
    return [to_workers, *from_workers] * max(1, int(parallel.data_parallel_size_local))
