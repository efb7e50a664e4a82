# SPDX-License-Identifier: Apache-2.0
"""The first request of a new engine process, of the lengths that choose different kernels.

Each engine is a process of its own: a kernel that ends its process is one failed test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TILE_DATA = 1 << 18  # XFEATURE_XTILEDATA, as in Linux' asm/prctl.h

_PERMISSIONS = """
import ctypes, platform

def permitted():
    mask = ctypes.c_uint64()
    if platform.machine() != "x86_64":
        return 0
    # arch_prctl(ARCH_GET_XCOMP_PERM): 0 on kernels that do not know it, which have no AMX either.
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))
    return mask.value

before = permitted()
import torch, vllm
from himap_vllm import plugin
from himap_vllm.processor import allow_amx

imported = permitted()
plugin.register()
print(before, imported, permitted(), allow_amx(), permitted())
"""


def _run(program: str, *arguments: str) -> str:
    """Standard output of a new Python process, whose last words are shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done.stdout


def test_registering_asks_for_the_tile_permission_where_there_is_amx() -> None:
    """Linux lists `amx_tile` where a process can be given it; elsewhere nothing is asked."""
    flags = Path("/proc/cpuinfo").read_text().split()
    *masks, allowed, final = _run(_PERMISSIONS).splitlines()[-1].split()
    before, imported, registered = map(int, masks)
    assert before == imported, "something asks by itself: the plugin need not"
    assert not before & _TILE_DATA
    if "amx_tile" in flags:
        assert registered & _TILE_DATA
        assert (allowed, int(final)) == ("True", registered)
    else:
        assert registered == before
        assert (allowed, int(final)) == ("False", registered)
