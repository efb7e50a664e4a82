# SPDX-License-Identifier: Apache-2.0
"""Score a cut in one kernel launch, for all pruned prompts of a step.

Work is split into *tiles*: up to `BLOCK_ROWS` rows that vote for one image. A program takes one
tile and one head. It computes each row's softmax denominator over the keys that the row sees, and
sums the rows' probabilities per image token. Probabilities of rows that do not vote are never
computed, and no probability is written to memory.

Tiles of an image must be added up. Atomic additions would add in another order each time and let
rounding decide close calls differently from run to run, so each program writes a partial sum of
its own, and one reduction adds them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.triton_utils import tl, triton

if TYPE_CHECKING:
    from himap_vllm.plan.step import Cut
    from himap_vllm.plan.voters import IntArray

BLOCK_ROWS = 32
BLOCK_KEYS = 64
_TILE_FIELDS = 8


@dataclass(frozen=True, slots=True)
class VoteTiles:
    """A cut's work list.

    Attributes:
        tiles: [num_tiles, 8] int64; the fields are named where the kernel reads them.
        rows: [num rows] int64, voting rows in the step; None: the image tokens' own rows, which
            are known on the device only.
        num_partials: most tiles that any image has.
    """

    tiles: IntArray
    rows: IntArray | None
    num_partials: int

    @classmethod
    def of(cls, cut: Cut) -> VoteTiles:
        """The tiles of a cut. Host arithmetic: a loop over images, without device operations."""
        tiles: list[tuple[int, ...]] = []
        rows: list[IntArray] = []
        num_rows = num_cached = num_partials = 0
        for request in cut.requests:
            if request.rows is None:
                first_row = request.image_tokens.start
            else:
                first_row = num_rows
                num_rows += len(request.rows)
                rows.append(request.rows + request.tokens.start)
            for vote in request.votes:
                begins = range(vote.rows.start, vote.rows.stop, BLOCK_ROWS)
                num_partials = max(num_partials, len(begins))
                tiles += [
                    (
                        first_row + begin,
                        min(BLOCK_ROWS, vote.rows.stop - begin),
                        request.image_tokens.start + vote.tokens.start,
                        vote.tokens.stop - vote.tokens.start,
                        request.tokens.start,
                        num_cached,
                        request.num_cached,
                        partial,
                    )
                    for partial, begin in enumerate(begins)
                ]
            num_cached += request.num_cached
        return cls(
            tiles=np.array(tiles, dtype=np.int64),
            rows=np.concatenate(rows) if rows else None,
            num_partials=num_partials,
        )


@triton.jit
def _accumulate(logits, maximum, total):
    """One step of the online softmax: running maximum and sum of exponentials per row."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    total = total * tl.exp(maximum - new_maximum)
    total += tl.sum(tl.exp(logits - new_maximum[:, None]), 1)
    return new_maximum, total


# The strides differ from step to step. A specialisation for some would be compiled while serving.
@triton.jit(do_not_specialize=["partial_stride", "partial_head_stride"])
def _vote_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    cached_ptr,  # [num cached keys, num_kv_heads, head_size]
    rows_ptr,  # [num rows]
    image_tokens_ptr,  # [num flat images]
    tiles_ptr,  # [num_tiles, NUM_FIELDS]
    partials_ptr,  # [num_partials, num_heads, num flat images]
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    cached_stride,
    cached_head_stride,
    partial_stride,
    partial_head_stride,
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
    first_cached = tl.load(tile_ptr + 5)
    num_cached = tl.load(tile_ptr + 6)
    partial = tl.load(tile_ptr + 7)

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
    cached_ptr += key_head * cached_head_stride

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
        key = tl.load(
            cached_ptr + (first_cached + other)[:, None] * cached_stride + channel[None, :],
            mask=(other < num_cached)[:, None] & in_head[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where((other < num_cached)[None, :], logits, float("-inf"))
        maximum, total = _accumulate(logits, maximum, total)
    log_total = maximum + tl.log(total)

    partials_ptr += partial * partial_stride + head * partial_head_stride + first_column
    for begin in range(0, num_columns, BLOCK_KEYS):
        inside = begin + column < num_columns
        other = tl.load(
            image_tokens_ptr + first_column + begin + column, mask=inside, other=first_token
        )
        key = tl.load(
            key_ptr + other[:, None] * key_stride + channel[None, :],
            mask=in_head[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        given = tl.exp(logits - log_total[:, None])
        given = tl.where(votes[:, None] & (other[None, :] <= token[:, None]), given, 0.0)
        tl.store(partials_ptr + begin + column, tl.sum(given, 0), mask=inside)


def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    cached: torch.Tensor,
    scale: float,
    tiles: torch.Tensor,
    rows: torch.Tensor,
    num_partials: int,
    image_tokens: torch.Tensor,
) -> torch.Tensor:
    """As `himap_vllm.pruning.importance.importance`, in one launch and one reduction.

    Args:
        query: [num_tokens, num_heads, head_size], channels contiguous.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        cached: [num cached keys, num_kv_heads, head_size], likewise.
        scale: softmax scale.
        tiles: [num_tiles, 8] `VoteTiles.tiles` on the device.
        rows: [num rows] `VoteTiles.rows` on the device, or `image_tokens` where that is None.
        num_partials: `VoteTiles.num_partials`.
        image_tokens: [num flat images] rows of the image tokens in the step.

    Returns:
        [num flat images] float32, summed over the heads given.
    """
    num_heads, head_size = query.shape[1:]
    # Zeros: an image with fewer tiles than another leaves partials unwritten.
    partials = torch.zeros(
        num_partials, num_heads, len(image_tokens), dtype=torch.float32, device=query.device
    )
    assert query.stride(2) == key.stride(2) == cached.stride(2) == 1
    _vote_kernel[(len(tiles), num_heads)](
        query,
        key,
        cached,
        rows,
        image_tokens,
        tiles,
        partials,
        scale,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        cached.stride(0),
        cached.stride(1),
        partials.stride(0),
        partials.stride(1),
        NUM_FIELDS=_TILE_FIELDS,
        HEADS_PER_KEY=num_heads // key.shape[1],
        HEAD_SIZE=head_size,
        BLOCK_HEAD=triton.next_power_of_2(head_size),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_KEYS=BLOCK_KEYS,
    )
    return partials.sum((0, 1))
