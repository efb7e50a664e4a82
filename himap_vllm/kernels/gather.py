# SPDX-License-Identifier: Apache-2.0
"""Gather hidden states, residual and positions of a cut's survivors in one launch."""

from __future__ import annotations

import os

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

_BLOCK = 1024
# Triton's interpreter runs one program after the other, and each takes milliseconds.
_ROWS = 64 if os.environ.get("TRITON_INTERPRET") == "1" else 1


# A specialisation for the number of rows would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    rows_ptr,  # [num_rows]
    hidden_ptr,
    residual_ptr,
    positions_ptr,
    hidden_out_ptr,
    residual_out_ptr,
    positions_out_ptr,
    hidden_stride,
    residual_stride,
    positions_stride,
    num_rows,
    NUM_DIMS: tl.constexpr,  # of the positions
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = target < num_rows
    source = tl.load(rows_ptr + target, mask=exists, other=0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = exists[:, None] & (channel < WIDTH)[None, :]
    places = target[:, None] * WIDTH + channel[None, :]
    hidden = tl.load(
        hidden_ptr + source[:, None] * hidden_stride + channel[None, :], mask=inside, other=0.0
    )
    tl.store(hidden_out_ptr + places, hidden, mask=inside)
    residual = tl.load(
        residual_ptr + source[:, None] * residual_stride + channel[None, :], mask=inside, other=0.0
    )
    tl.store(residual_out_ptr + places, residual, mask=inside)
    if tl.program_id(1) == 0:
        for dim in tl.static_range(NUM_DIMS):
            position = tl.load(
                positions_ptr + dim * positions_stride + source, mask=exists, other=0
            )
            tl.store(positions_out_ptr + dim * positions_stride + target, position, mask=exists)


def gather_rows(
    rows: torch.Tensor,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the same rows of all three tensors, in one launch if Triton is available.

    Args:
        rows: [num_rows] int64.
        positions: [num_tokens], or [3, num_tokens] with M-RoPE.
        hidden_states: [num_tokens, hidden_size], channels contiguous.
        residual: [num_tokens, hidden_size], likewise.
        out: buffers for positions (laid out like `positions`), hidden states and residual
            (contiguous). Each has `num_rows` tokens or more; the other tokens stay as they are.

    Returns:
        positions, hidden states and residual of the rows, or `out` if it is given.
    """
    width = hidden_states.shape[1]
    outputs = out or (
        empty_positions(positions, len(rows)),
        hidden_states.new_empty(len(rows), width),
        residual.new_empty(len(rows), width),
    )
    if not HAS_TRITON:
        num_rows = len(rows)
        torch.index_select(positions, -1, rows, out=outputs[0][..., :num_rows])
        torch.index_select(hidden_states, 0, rows, out=outputs[1][:num_rows])
        torch.index_select(residual, 0, rows, out=outputs[2][:num_rows])
        return outputs
    assert hidden_states.stride(1) == residual.stride(1) == positions.stride(-1) == 1
    assert outputs[0].stride() == positions.stride()
    _gather_kernel[(triton.cdiv(len(rows), _ROWS), triton.cdiv(width, _BLOCK))](
        rows,
        hidden_states,
        residual,
        positions,
        outputs[1],
        outputs[2],
        outputs[0],
        hidden_states.stride(0),
        residual.stride(0),
        positions.stride(0),
        len(rows),
        NUM_DIMS=positions.numel() // positions.shape[-1],
        WIDTH=width,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
    )
    return outputs


def empty_positions(positions: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Allocate `num_rows` positions, laid out like `positions`.

    vLLM's M-RoPE positions are columns of a longer buffer. The result has the same stride in every
    step, so Triton compiles the kernel once, and the compiled segments see the layout that they
    were traced with.
    """
    if positions.ndim == 1:
        return positions.new_empty(num_rows)
    num_dims, stride = len(positions), positions.stride(0)
    return positions.new_empty(num_dims, stride)[:, :num_rows]
