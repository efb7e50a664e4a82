# SPDX-License-Identifier: Apache-2.0
"""KV cache slots of the later stages, on the device, for all their KV cache groups at once.

* `vllm.v1.attention.backends.utils.PAD_SLOT_ID` (read): the kernels that write the KV cache skip
  this slot. Remove when: Triton kernels may read module constants of other packages.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

PAD_SLOT = -1
_BLOCK = 1024


# A specialisation for the step's size would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_slots"])
def _stage_slots_kernel(
    groups_ptr,  # [num later groups, 2]
    query_start_loc_ptr,  # [num later stages, >= num_reqs + 1]
    query_start_loc_stride,
    seq_lens_ptr,  # [num later stages, >= num_reqs]
    seq_lens_stride,
    block_table_ptrs,  # [num groups] to [num_reqs, blocks] int32
    block_table_strides,  # [num groups]
    block_sizes_ptr,  # [num groups]
    slot_mappings_ptr,  # [num groups, num_slots]
    slot_mappings_stride,
    num_slots,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.load(groups_ptr + 2 * tl.program_id(0))
    stage = tl.load(groups_ptr + 2 * tl.program_id(0) + 1)
    request = tl.program_id(1)
    query_start_loc_ptr += stage * query_start_loc_stride + request
    slots_ptr = slot_mappings_ptr + group * slot_mappings_stride
    first = tl.load(query_start_loc_ptr)
    if request == tl.num_programs(1) - 1:
        # Rows that exist in the first stage only.
        for begin in range(first, num_slots, BLOCK):
            row = begin + tl.arange(0, BLOCK)
            tl.store(slots_ptr + row, PAD, mask=row < num_slots)
        return
    end = tl.load(query_start_loc_ptr + 1)
    # The KV position that row 0 would have in this request.
    offset = tl.load(seq_lens_ptr + stage * seq_lens_stride + request) - end
    block_size = tl.load(block_sizes_ptr + group)
    table_ptr = tl.load(block_table_ptrs + group).to(tl.pointer_type(tl.int32))
    table_ptr += request * tl.load(block_table_strides + group)
    for begin in range(first, end, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < end
        position = tl.where(inside, offset + row, 0)
        block = tl.load(table_ptr + position // block_size, mask=inside, other=0)
        slot = block.to(tl.int64) * block_size + position % block_size
        tl.store(slots_ptr + row, slot, mask=inside)


def write_stage_slots(
    groups: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_reqs: int,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mappings: torch.Tensor,
) -> None:
    """Overwrite rows of `slot_mappings` in one launch.

    Args:
        groups: [num later groups, 2] int64, KV cache groups of the later stages, each with its
            stage: 0 after the first cut, 1 after the second.
        query_start_loc: [2, >= num_reqs + 1] int32, first row of each request per later stage.
        seq_lens: [2, >= num_reqs] int32, KV entries after this step per later stage.
        num_reqs: requests of the step.
        block_table_ptrs: [num groups] uint64, addresses of block tables in batch order.
        block_table_strides: [num groups] int64, elements from one row of a table to the next.
        block_sizes: [num groups] int32.
        slot_mappings: [num groups, num slots] int64; what a stage does not need is padded.
    """
    _stage_slots_kernel[(len(groups), num_reqs + 1)](
        groups,
        query_start_loc,
        query_start_loc.stride(0),
        seq_lens,
        seq_lens.stride(0),
        block_table_ptrs,
        block_table_strides,
        block_sizes,
        slot_mappings,
        slot_mappings.stride(0),
        slot_mappings.shape[1],
        PAD=PAD_SLOT,
        BLOCK=_BLOCK,
    )
