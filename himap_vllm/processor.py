# SPDX-License-Identifier: Apache-2.0
"""The permission that a process needs before vLLM's CPU kernels run in it.

Linux gives AMX tile registers only to processes that asked (`arch_prctl(ARCH_REQ_XCOMP_PERM)`). In
other processes the first tile instruction ends the process with SIGILL. The permission holds for
all threads of the process and for forked children, but not for newly started programs.

* `torch.cpu._init_amx` (called): vLLM's AMX attention kernel, which runs for every bfloat16 model
  on a processor with AMX, does not ask. It works only if oneDNN has asked before, which happens
  when a matrix product first takes oneDNN's own AMX kernel. A first prompt of up to 4 tokens does
  not use that kernel, so it kills the worker. Every engine has this fault, so the plugin asks
  wherever it is installed, pruning or not. Remove when: vLLM asks before its first AMX kernel.
* `torch.cpu._is_amx_tile_supported` (called): vLLM chooses its AMX kernels by it. It reads the
  processor, not the permission, so a missing permission can be reported before a kernel runs.
  Remove when: vLLM chooses its kernels by the permission.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.himap.processor")


def allow_amx() -> bool:
    """Ask Linux for this process's AMX permission; return whether AMX can be used. Repeatable.

    Does nothing on a processor without AMX.
    """
    import torch  # here: the plugin is loaded into processes where vLLM has imported it already

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    ask = getattr(torch.cpu, "_init_amx", None)
    if supported is None or ask is None or not supported():
        return False
    if ask():
        return True
    logger.error(
        "the processor has AMX, but the operating system does not let this process use it: on the "
        "CPU, vLLM's bfloat16 attention will end with SIGILL; use --dtype float32 or a host that "
        "allows AMX"
    )
    return False
