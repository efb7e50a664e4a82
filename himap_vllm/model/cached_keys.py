# SPDX-License-Identifier: Apache-2.0
"""Find keys in vLLM's paged KV cache.

The rows that vote also attend to what precedes their unit. If that was computed in an earlier step
(chunked prefill, prefix caching), its keys exist only in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops

from himap_vllm.kernels.importance import KeyPages

KeyReader = Callable[[Any, torch.Tensor, torch.Tensor, int], KeyPages]
"""(attention layer, its kv_cache, block table [num_reqs, blocks], most keys that one request
has in the cache) -> the keys of all these requests."""


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
    layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, longest: int
) -> KeyPages:
    """Copy keys from the cache of `CPUAttentionBackend`, and put them in order.

    `kv_cache` is [num_blocks, num_kv_heads, block_size, 2 * head_size]; per block and head it
    holds all keys, then all values.

    * `vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward` (read): that layout.
      Remove when: vLLM exposes a gather from the CPU KV cache.
    """
    block_size, width = kv_cache.shape[2:]
    if not longest:
        return KeyPages(kv_cache[:0, ..., : width // 2], block_table)
    order = _cpu_key_order(layer.isa, kv_cache.dtype, block_size, width // 2)
    blocks = block_table[:, : -(-longest // block_size)]
    pages = kv_cache[blocks.flatten().long()].flatten(2)[:, :, order]
    return KeyPages(pages, torch.arange(blocks.numel(), dtype=torch.int32).view(blocks.shape))


def read_flash_keys(
    layer: Any,  # noqa: ARG001
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    longest: int,  # noqa: ARG001
) -> KeyPages:
    """Keys in the cache of `FlashAttentionBackend`, where they lie.

    `kv_cache` is [num_blocks, num_kv_heads, block_size, 2 * head_size], key and value of a token
    side by side.

    * `vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward` (read): that layout. Remove
      when: vLLM exposes a gather from the KV cache.
    """
    return KeyPages(kv_cache[..., : kv_cache.shape[-1] // 2], block_table)


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
