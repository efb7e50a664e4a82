# SPDX-License-Identifier: Apache-2.0
"""The first request of a new engine process, of the lengths that choose different kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.world import compiled_or_not

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

# No warm-up: with a KV cache of given size and without compilation vLLM runs none by itself. An
# engine that nobody has asked anything is forked for each length: a new engine for each. It has one
# thread, because OpenMP's threads do not survive a fork.
_FIRST_REQUESTS = """
import json, os, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from himap_demo import MODEL_PATH

settings = json.loads((Path(MODEL_PATH) / "himap.json").read_text())
engine = LLM(
    str(MODEL_PATH), additional_config={"himap": settings}, enforce_eager=sys.argv[1] == "eager",
    max_model_len=256, max_num_seqs=2, max_num_batched_tokens=512,
    kv_cache_memory_bytes=64 << 20, limit_mm_per_prompt={"image": 1},
)
print(engine.model_config.dtype, flush=True)
for length in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        prompt = {"prompt_token_ids": [50 + i for i in range(length)]}
        params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)
        (output,) = engine.generate(prompt, params, use_tqdm=False)
        print(len(output.prompt_token_ids), len(output.outputs[0].token_ids), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(length, "ended with", os.waitstatus_to_exitcode(status), flush=True)
"""
_LENGTHS = (1, 4, 5, 40)


def _run(program: str, *arguments: str, **environment: str) -> str:
    """Standard output of a new Python process, whose last words are shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
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


@compiled_or_not
def test_the_first_request_of_a_new_engine(compiled: bool) -> None:
    """In bfloat16, for which vLLM takes its AMX kernels where it can; up to 4 tokens, others."""
    kind = "compiled" if compiled else "eager"
    core = str(min(os.sched_getaffinity(0)))
    output = _run(_FIRST_REQUESTS, kind, *map(str, _LENGTHS), VLLM_CPU_OMP_THREADS_BIND=core)
    _, bfloat16, answers = output.partition("torch.bfloat16\n")
    assert bfloat16
    assert [line.split() for line in answers.splitlines()] == [[str(n), "2"] for n in _LENGTHS]
