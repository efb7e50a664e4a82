# SPDX-License-Identifier: Apache-2.0
"""Read keys back from vLLM's paged KV cache.

The rows that vote also attend to text before the first image. If that text was computed in an
earlier step (chunked prefill, prefix caching), its keys exist only in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops

KeyReader = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(attention layer, its kv_cache, block table [num_reqs, blocks], request [n], KV position [n]) ->
keys [n, num_kv_heads, head_size]. One gather, whatever requests the keys belong to."""


@functools.cache
def _cpu_key_order(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> torch.Tensor:
    """[block_size, head_size]: where vLLM's CPU kernel puts each element of one block and head.

    Once per process, three writes of numbered keys into one block show where the kernel puts each
    element. The numbers are base-128 digits, which are exact in every dtype.

    * `vllm._custom_ops.cpu_attn_reshape_and_cache` (called): the kernel stores keys in an order of
      its own per instruction set, undocumented and private. Remove when: vLLM exposes a gather from
      the CPU KV cache.
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
    layer: Any,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Keys from the cache of `CPUAttentionBackend`.

    `kv_cache` is [num_blocks, num_kv_heads, block_size, 2 * head_size]; per block and head it
    holds all keys, then all values.

    * `vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward` (read): that layout.
      Remove when: vLLM exposes a gather from the CPU KV cache.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    order = _cpu_key_order(layer.isa, kv_cache.dtype, block_size, width // 2)
    blocks = block_table[requests, positions // block_size].long()
    heads = torch.arange(num_kv_heads)
    interiors = kv_cache.view(num_blocks, num_kv_heads, block_size * width)
    return interiors[blocks[:, None, None], heads[:, None], order[positions % block_size][:, None]]


def read_flash_keys(
    layer: Any,  # noqa: ARG001
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Keys from the cache of `FlashAttentionBackend`.

    `kv_cache` is [num_blocks, num_kv_heads, block_size, 2 * head_size], key and value of a token
    side by side.

    * `vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward` (read): that layout. Remove
      when: vLLM exposes a gather from the KV cache.
    """
    block_size, width = kv_cache.shape[2:]
    blocks = block_table[requests, positions // block_size].long()
    return kv_cache[blocks, :, positions % block_size, : width // 2]


_READERS: dict[str, KeyReader] = {"CPU_ATTN": read_cpu_keys, "FLASH_ATTN": read_flash_keys}


def key_reader(backend_name: str) -> KeyReader:
    """The reader for an attention backend.

    Raises:
        ValueError: no reader for it.
    """
    try:
        return _READERS[backend_name]
    except KeyError:
        raise ValueError(
            f"himap: attention backend {backend_name} is not supported: choose another with "
            f"--attention-backend; supported: {', '.join(_READERS)}"
        ) from None
