# SPDX-License-Identifier: Apache-2.0
"""Score a cut in two kernel launches, for all pruned prompts of a step.

The first launch takes up to `BLOCK_ROWS` voting rows and one head per program, and computes each
row's softmax denominator over the keys that the row sees. The second takes up to `BLOCK_KEYS` image
tokens of one image and one head per program, walks over the rows that vote for that image, and sums
their probabilities. Probabilities of rows that do not vote are never computed, and no probability
is written to memory: what is written grows with rows and image tokens, not with their product.

Each sum is added up by one program, in the order of the rows. Atomic additions would add in another
order each time and let rounding decide close calls differently from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.triton_utils import tl, triton

if TYPE_CHECKING:
    from himap_vllm.plan.step_layout import Cut
    from himap_vllm.plan.voters import IntArray

BLOCK_ROWS = 32
BLOCK_KEYS = 64
_TILE_FIELDS = 5


class KeyPages(NamedTuple):
    """Keys of one layer in the KV cache.

    Attributes:
        pages: [num_blocks, num_kv_heads, block_size, head_size], channels contiguous.
        block_table: [num_reqs, blocks] int32, the pages of each request.
    """

    pages: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class VoteTiles:
    """A cut's work lists.

    Attributes:
        of_rows: [num_tiles, 5] int64, rows that vote. The fields are named where the kernel reads
            them.
        of_columns: [num_tiles, 5] int64, image tokens that get votes; likewise.
        rows: [num rows] int64, voting rows in the step; None: the image tokens' own rows, which
            are known on the device only.
    """

    of_rows: IntArray
    of_columns: IntArray
    rows: IntArray | None

    @classmethod
    def of(cls, cut: Cut) -> VoteTiles:
        """The tiles of a cut. Host arithmetic: a loop over images, without device operations."""
        of_rows: list[tuple[int, ...]] = []
        of_columns: list[tuple[int, ...]] = []
        rows: list[IntArray] = []
        num_rows = 0
        for unit in cut.units:
            if unit.rows is None:
                first_row = unit.image_tokens.start
                count = unit.image_tokens.stop - first_row
            else:
                first_row, count = num_rows, len(unit.rows)
                num_rows += count
                rows.append(unit.rows + unit.tokens.start)
            of_rows += [
                (
                    first_row + begin,
                    min(BLOCK_ROWS, count - begin),
                    unit.tokens.start,
                    unit.request,
                    unit.num_cached,
                )
                for begin in range(0, count, BLOCK_ROWS)
            ]
            for vote in unit.votes:
                for begin in range(vote.tokens.start, vote.tokens.stop, BLOCK_KEYS):
                    row = vote.rows.start
                    if unit.rows is None:  # image tokens vote, and see nothing behind them
                        row = max(row, begin)
                    of_columns.append(
                        (
                            first_row + row,
                            vote.rows.stop - row,
                            unit.image_tokens.start + begin,
                            min(BLOCK_KEYS, vote.tokens.stop - begin),
                            unit.tokens.start,
                        )
                    )
        return cls(
            of_rows=np.array(of_rows, dtype=np.int64),
            of_columns=np.array(of_columns, dtype=np.int64),
            rows=np.concatenate(rows) if rows else None,
        )


@triton.jit
def _accumulate(logits, maximum, total):
    """One step of the online softmax: running maximum and sum of exponentials per row."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    total = total * tl.exp(maximum - new_maximum)
    total += tl.sum(tl.exp(logits - new_maximum[:, None]), 1)
    return new_maximum, total


# These strides differ from step to step. A specialisation for some would be compiled while serving.
@triton.jit(do_not_specialize=["block_table_stride", "log_totals_stride"])
def _log_totals_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    pages_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    block_table_ptr,  # [num_reqs, blocks]
    rows_ptr,  # [num rows]
    tiles_ptr,  # [num_tiles, NUM_FIELDS]
    log_totals_ptr,  # [num_heads, num rows]
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    page_stride,
    page_head_stride,
    page_token_stride,
    block_size,
    block_table_stride,
    log_totals_stride,
    NUM_FIELDS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * NUM_FIELDS
    head = tl.program_id(1)
    first_row = tl.load(tile_ptr)
    num_rows = tl.load(tile_ptr + 1)
    first_token = tl.load(tile_ptr + 2)  # of the prompt, in the step
    request = tl.load(tile_ptr + 3)  # row in the batch
    num_cached = tl.load(tile_ptr + 4)

    channel = tl.arange(0, BLOCK_HEAD)
    in_head = channel < HEAD_SIZE
    row = tl.arange(0, BLOCK_ROWS)
    votes = row < num_rows
    # Rows that only fill the block stand where the prompt begins: they see a key, so that no
    # softmax is empty.
    token = tl.load(rows_ptr + first_row + row, mask=votes, other=first_token)
    query = tl.load(
        query_ptr + token[:, None] * query_stride + head * query_head_stride + channel[None, :],
        mask=in_head[None, :],
        other=0.0,
    )
    key_head = head // HEADS_PER_KEY
    key_ptr += key_head * key_head_stride
    pages_ptr += key_head * page_head_stride
    block_table_ptr += request * block_table_stride

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    column = tl.arange(0, BLOCK_KEYS)
    # The prompt's own keys first: each row sees one of the first block.
    num_seen = tl.max(token, 0) + 1 - first_token
    for begin in range(0, num_seen, BLOCK_KEYS):
        other = first_token + begin + column
        key = tl.load(
            key_ptr + other[:, None] * key_stride + channel[None, :],
            mask=(begin + column < num_seen)[:, None] & in_head[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where(other[None, :] <= token[:, None], logits, float("-inf"))
        maximum, total = _accumulate(logits, maximum, total)
    for begin in range(0, num_cached, BLOCK_KEYS):
        other = begin + column
        inside = other < num_cached
        block = tl.load(block_table_ptr + other // block_size, mask=inside, other=0)
        # 64 bits: a KV cache has more elements than 32 bits can count.
        place = block.to(tl.int64) * page_stride + (other % block_size) * page_token_stride
        key = tl.load(
            pages_ptr + place[:, None] + channel[None, :],
            mask=inside[:, None] & in_head[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        maximum, total = _accumulate(logits, maximum, total)
    log_totals_ptr += head * log_totals_stride + first_row
    tl.store(log_totals_ptr + row, maximum + tl.log(total), mask=votes)


@triton.jit(do_not_specialize=["log_totals_stride", "received_stride"])
def _vote_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    rows_ptr,  # [num rows]
    image_tokens_ptr,  # [num flat images]
    tiles_ptr,  # [num_tiles, NUM_FIELDS]
    log_totals_ptr,  # [num_heads, num rows]
    received_ptr,  # [num_heads, num flat images]
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    log_totals_stride,
    received_stride,
    NUM_FIELDS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * NUM_FIELDS
    head = tl.program_id(1)
    first_row = tl.load(tile_ptr)
    num_rows = tl.load(tile_ptr + 1)
    first_column = tl.load(tile_ptr + 2)
    num_columns = tl.load(tile_ptr + 3)
    first_token = tl.load(tile_ptr + 4)  # of the prompt, in the step

    channel = tl.arange(0, BLOCK_HEAD)
    in_head = channel < HEAD_SIZE
    column = tl.arange(0, BLOCK_KEYS)
    inside = column < num_columns
    other = tl.load(image_tokens_ptr + first_column + column, mask=inside, other=first_token)
    key_ptr += (head // HEADS_PER_KEY) * key_head_stride
    key = tl.load(
        key_ptr + other[:, None] * key_stride + channel[None, :],
        mask=in_head[None, :],
        other=0.0,
    )
    query_ptr += head * query_head_stride
    log_totals_ptr += head * log_totals_stride
    received = tl.zeros([BLOCK_KEYS], tl.float32)
    for begin in range(0, num_rows, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        votes = row < num_rows
        token = tl.load(rows_ptr + first_row + row, mask=votes, other=first_token)
        log_total = tl.load(log_totals_ptr + first_row + row, mask=votes, other=0.0)
        query = tl.load(
            query_ptr + token[:, None] * query_stride + channel[None, :],
            mask=in_head[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        given = tl.exp(logits - log_total[:, None])
        given = tl.where(votes[:, None] & (other[None, :] <= token[:, None]), given, 0.0)
        received += tl.sum(given, 0)
    received_ptr += head * received_stride + first_column
    tl.store(received_ptr + column, received, mask=inside)


def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    cached: KeyPages,
    scale: float,
    of_rows: torch.Tensor,
    of_columns: torch.Tensor,
    rows: torch.Tensor,
    image_tokens: torch.Tensor,
) -> torch.Tensor:
    """As `himap_vllm.pruning.importance.importance`, in two launches and one reduction.

    Beside the result it takes 4 bytes for each head and voting row, and for each head and image
    token.

    Args:
        query: [num_tokens, num_heads, head_size], channels contiguous.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        cached: the keys that the prompts' earlier chunks left in the KV cache. They are read where
            they lie.
        scale: softmax scale.
        of_rows: [num_tiles, 5] `VoteTiles.of_rows` on the device.
        of_columns: [num_tiles, 5] `VoteTiles.of_columns` on the device.
        rows: [num rows] `VoteTiles.rows` on the device, or `image_tokens` where that is None.
        image_tokens: [num flat images] rows of the image tokens in the step.

    Returns:
        [num flat images] float32, summed over the heads given.
    """
    num_heads, head_size = query.shape[1:]
    log_totals = query.new_empty(num_heads, len(rows), dtype=torch.float32)
    received = query.new_empty(num_heads, len(image_tokens), dtype=torch.float32)
    pages, block_table = cached
    assert query.stride(2) == key.stride(2) == pages.stride(3) == 1
    sizes = {
        "NUM_FIELDS": _TILE_FIELDS,
        "HEADS_PER_KEY": num_heads // key.shape[1],
        "HEAD_SIZE": head_size,
        "BLOCK_HEAD": triton.next_power_of_2(head_size),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_KEYS": BLOCK_KEYS,
    }
    strides = (*query.stride()[:2], *key.stride()[:2])
    _log_totals_kernel[(len(of_rows), num_heads)](
        *(query, key, pages, block_table, rows, of_rows, log_totals, scale),
        *strides,
        *pages.stride()[:3],
        pages.shape[2],
        block_table.stride(0),
        log_totals.stride(0),
        **sizes,
    )
    _vote_kernel[(len(of_columns), num_heads)](
        *(query, key, rows, image_tokens, of_columns, log_totals, received, scale),
        *strides,
        log_totals.stride(0),
        received.stride(0),
        **sizes,
    )
    return received.sum(0)
