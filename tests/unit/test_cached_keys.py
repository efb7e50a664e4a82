# SPDX-License-Identifier: Apache-2.0
"""Keys are read back from vLLM's paged cache as they were written, in the processor's own order."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from himap_vllm.model.cached_keys import read_cpu_keys
from tests.programs import ROOT

NUM_BLOCKS, NUM_HEADS = 5, 2
LAYOUTS = [
    pytest.param(dtype, block_size, head_size, isa, id=f"{dtype}-{block_size}-{head_size}-{isa}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for block_size in (32, 64, 16)
    for head_size in (32, 128, 80)
    for isa in [_get_attn_isa(dtype, block_size, head_size)]
]


@pytest.mark.parametrize(("dtype", "block_size", "head_size", "isa"), LAYOUTS)
def test_keys_come_back(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> None:
    """The test's id names the instruction set that vLLM chose here."""
    cache = torch.zeros(NUM_BLOCKS, NUM_HEADS, block_size, 2 * head_size, dtype=dtype)
    tokens = 3 * block_size - 5
    keys = torch.randn(tokens, NUM_HEADS, head_size).to(dtype)
    table = torch.tensor([[4, 1, 3]])
    positions = torch.arange(tokens)
    slots = table[0, positions // block_size] * block_size + positions % block_size
    key_cache, value_cache = cache.view(NUM_BLOCKS, NUM_HEADS, 2 * block_size, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, -keys, key_cache, value_cache, slots, isa)
    for longest in (tokens, block_size, 1):
        pages, own_table = read_cpu_keys(SimpleNamespace(isa=isa), cache, table, longest)
        assert own_table.shape == (1, -(-longest // block_size))
        got = pages[own_table[0].long()].transpose(1, 2).flatten(0, 1)
        assert torch.equal(got[:longest], keys[:longest])


def test_the_processor_can_be_narrowed() -> None:
    """By `python -m tests --isa`: in every process, as vLLM sees it."""
    code = """if True:
        import torch
        print([n for n, f in vars(torch.cpu).items() if getattr(f, "__name__", "") == "absent"])
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests" / "narrowed"),
            "HIMAP_TEST_ISA": "avx512",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    narrowed = {f"_is_{name}_supported" for name in ("amx_tile", "amx_fp16", "avx512_bf16", "vnni")}
    assert set(ast.literal_eval(done.stdout)) == narrowed
