# SPDX-License-Identifier: Apache-2.0
"""Reading keys back from vLLM's paged KV cache.

The rows that vote attend to text before the first image too. Where that text was computed in an
earlier step (chunked prefill, prefix caching), its keys exist only in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops

KeyReader = Callable[[Any, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(attention layer, its kv_cache, block table row [blocks], n) -> [n, num_kv_heads, head_size]."""


@functools.cache
def _cpu_key_order(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> torch.Tensor:
    """[block_size, head_size] where vLLM's CPU kernel puts each element of one block and head.

    The kernel stores keys in an order of its own per instruction set, undocumented and private.
    Instead of repeating it, write numbered keys through the kernel and look where they went; once
    per process, three writes into one block. Base-128 digits are exact in every dtype. Can go
    when vLLM exposes a gather from the CPU KV cache.
    """
    numbers = torch.arange(block_size * head_size).view(block_size, 1, head_size)
    slots = torch.arange(block_size)
    source = torch.zeros(block_size * head_size, dtype=torch.int64)
    for digit in range(3):
        keys = (numbers >> (7 * digit)) & 127
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys.to(dtype), torch.zeros_like(keys, dtype=dtype), key_cache, value_cache, slots, isa
        )
        source += key_cache.reshape(-1).to(torch.int64) << (7 * digit)
    return torch.argsort(source).view(block_size, head_size)


def read_cpu_keys(
    layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, num_keys: int
) -> torch.Tensor:
    """Keys from the cache of `CPUAttentionBackend`.

    `kv_cache` is [num_blocks, num_kv_heads, block_size, 2 * head_size]; per block and head it
    holds all keys, then all values (`CPUAttentionBackendImpl.forward`).
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    order = _cpu_key_order(layer.isa, kv_cache.dtype, block_size, head_size)
    blocks = kv_cache[block_table[: -(-num_keys // block_size)].long()]
    keys = blocks.reshape(len(blocks), num_kv_heads, -1)[:, :, order]
    return keys.transpose(1, 2).reshape(-1, num_kv_heads, head_size)[:num_keys]


def key_reader(backend_name: str) -> KeyReader:
    """The reader for an attention backend.

    Raises:
        ValueError: no reader for it.
    """
    if backend_name == "CPU_ATTN":
        return read_cpu_keys
    raise ValueError(
        f"himap: attention backend {backend_name} is not supported; supported: CPU_ATTN"
    )
