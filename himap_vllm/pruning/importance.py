# SPDX-License-Identifier: Apache-2.0
"""Importance of image tokens: attention probability received from voting rows.

HiMAP (CVPR 2025), Eq. 8 at the first cut and Eq. 9, as its text and code have it, at the second:
the column sum of the head-averaged softmax over the rows that vote. Only those rows are computed;
the attention kernel stays as it is.

This is the plain torch form, which a CPU runs and `himap_vllm.kernels.importance` is
tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from himap_vllm.kernels.importance import KeyPages

if TYPE_CHECKING:
    from himap_vllm.plan.step_layout import Cut, PrunedUnit

CachedKeys = Callable[[slice, int], KeyPages]
"""(rows in the batch, most keys that one of these requests has in the cache) -> their keys."""

# Bounds the probabilities held at once: heads * rows * keys, in float32.
_MAX_PROBABILITIES = 32 * 1024 * 1024


def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    cached_keys: CachedKeys,
    scale: float,
    cut: Cut,
    image_tokens: torch.Tensor,
) -> torch.Tensor:
    """Score every image token of the step.

    A loop over the units that the step prunes: on a CPU there is no launch to save, and padding
    them to one batch costs more than it saves.

    Args:
        query: [num_tokens, num_heads, head_size] of the layer before the cut, rotary applied.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        cached_keys: finds the keys that the prompts' earlier chunks left in the KV cache. Those of
            one prompt are held at a time.
        scale: softmax scale.
        cut: the units to score.
        image_tokens: [num flat images] their rows in `query` and `key`.

    Returns:
        [num flat images] float32, summed over the heads given. Every cut of a prompt compares
        sums over the same number of heads, so the mean's constant factor is left out.
    """
    scores = query.new_empty(cut.num_image_tokens, dtype=torch.float32)
    request, earlier = -1, key[:0]
    for unit in cut.units:
        keys = key[unit.tokens]
        if unit.num_cached:
            if unit.request != request:  # its units follow one another
                request, earlier = unit.request, _earlier_keys(unit, cached_keys)
            keys = torch.cat([earlier, keys])
        columns = image_tokens[unit.image_tokens] - unit.tokens.start
        rows = columns if unit.rows is None else torch.from_numpy(unit.rows)
        scores[unit.image_tokens] = _received(query[unit.tokens], keys, scale, rows, columns, unit)
    return scores


def _earlier_keys(unit: PrunedUnit, cached_keys: CachedKeys) -> torch.Tensor:
    """[num_cached, num_kv_heads, head_size] the keys that a prompt has in the KV cache."""
    row = slice(unit.request, unit.request + 1)
    pages, block_table = cached_keys(row, unit.num_cached)
    num_blocks = -(-unit.num_cached // pages.shape[2])
    keys = pages[block_table[0, :num_blocks].long()].transpose(1, 2)
    return keys.flatten(0, 1)[: unit.num_cached]


def _received(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    columns: torch.Tensor,
    unit: PrunedUnit,
) -> torch.Tensor:
    """Column sums of one unit; rows and columns are relative to its rows in this step."""
    num_keys, num_kv_heads, head_size = keys.shape
    grouped = query.view(len(query), num_kv_heads, -1, head_size)
    num_heads = query.shape[1]
    transposed = keys.float().permute(1, 2, 0).unsqueeze(1)  # [kv_heads, 1, head_size, keys]
    position = torch.arange(num_keys, device=keys.device)
    columns = columns + unit.num_cached
    received = torch.zeros(len(columns), dtype=torch.float32, device=keys.device)
    step = max(1, _MAX_PROBABILITIES // (num_heads * num_keys))
    for begin in range(0, len(rows), step):
        chunk = rows[begin : begin + step]
        logits = grouped[chunk].permute(1, 2, 0, 3).float() * scale @ transposed
        logits.masked_fill_(position > (chunk + unit.num_cached)[:, None], float("-inf"))
        attention = logits.softmax(-1).sum((0, 1))[:, columns]  # [rows, image tokens]
        for vote in unit.votes:
            own = slice(max(0, vote.rows.start - begin), max(0, vote.rows.stop - begin))
            received[vote.tokens] += attention[own, vote.tokens].sum(0)
    return received
