# SPDX-License-Identifier: Apache-2.0
"""Environment of tests with engines; import it before vLLM, transformers and Triton.

Engines run in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): they start in seconds, and tests
can look at the scheduler's own block tables. test_vllm_server.py runs the usual processes.
"""

from __future__ import annotations

import os

from tests import interpreter

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose by more threads
# Otherwise vLLM binds the one thread of every server to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if interpreter.WANTED:
    interpreter.enable()
