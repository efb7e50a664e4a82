# SPDX-License-Identifier: Apache-2.0
"""Block tables of all KV cache groups as one array, for Model Runner V1, which runs on CPUs.

vLLM looks up the slots of a step's tokens group by group, with one kernel launch each. The groups
of a stage differ only in their block ids, so one NumPy lookup serves all of them.

* `vllm.v1.worker.block_table.MultiGroupBlockTable` (subclassed): `InputBatch.block_table` is one;
  the buffers of its groups become views of the array. Remove when: Model Runner V1 goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable

from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step import StepPlan


class StageBlockTables(MultiGroupBlockTable):
    """vLLM's block tables, for groups in the order of their stages.

    Attributes:
        himap_step_plan: of the step that is prepared; None if every stage sees the same tokens.
        himap_slots: [num_groups, max_num_tokens] int64, the slots of the step's tokens.
        himap_blocks: [num_groups, max_num_reqs, max_num_blocks] int32, the block tables.
    """

    himap_step_plan: StepPlan | None
    himap_slots: torch.Tensor
    himap_blocks: torch.Tensor
    _himap_tables: npt.NDArray[np.int32]  # himap_blocks
    _himap_ends: npt.NDArray[np.int32]  # [num_groups, max_num_reqs] blocks of each row
    _himap_stages: npt.NDArray[np.int64]  # [num_groups]
    _himap_groups: Sequence[slice]  # of each stage

    @override
    def append_row(self, block_ids: tuple[list[int], ...], row_idx: int) -> None:
        """As `MultiGroupBlockTable.append_row`; the groups of a stage get equally many blocks."""
        for groups in self._himap_groups:
            count = len(block_ids[groups.start])
            if count:
                start = int(self._himap_ends[groups.start, row_idx])
                self._himap_tables[groups, row_idx, start : start + count] = block_ids[groups]
                self._himap_ends[groups, row_idx] = start + count

    @override
    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """As `MultiGroupBlockTable.compute_slot_mapping`, but each stage has its own tokens."""
        plan = self.himap_step_plan
        if plan is not None and plan.prunes:
            for groups, stage in zip(self._himap_groups, plan.stages, strict=True):
                self._look_up(groups, _rows(stage.query_start_loc), stage.positions)
            return
        # Every stage has the same tokens, at positions that differ by the dropped tokens.
        rows, where = _rows(query_start_loc[: num_reqs + 1].numpy()), positions.numpy()
        if plan is not None:
            lengths = np.stack([stage.seq_lens for stage in plan.stages])
            where = where - (lengths[0] - lengths)[self._himap_stages][:, rows]
        self._look_up(slice(None), rows, where)

    def _look_up(self, groups: slice, rows: npt.NDArray[Any], positions: npt.NDArray[Any]) -> None:
        """Slots of tokens: `positions` are [num_tokens], or [num_groups, num_tokens]."""
        block_size = self.block_tables[0].block_size
        tables = self._himap_tables[groups]
        blocks, offsets = np.divmod(positions, block_size)
        slots = self.himap_slots.numpy()[groups, : len(rows)]
        found = tables[np.arange(len(tables))[:, None], rows, blocks]
        np.multiply(found, block_size, out=slots, dtype=np.int64)
        slots += offsets

    @override
    def commit_block_table(self, num_reqs: int) -> None:
        """Do nothing: the device's tables are the host's."""


def make_stage_block_tables(tables: MultiGroupBlockTable, stages: Sequence[int]) -> None:
    """Turn a CPU runner's block tables into `StageBlockTables`, in place.

    Args:
        tables: the runner's.
        stages: of each group, in ascending order.
    """
    groups = tables.block_tables
    assert list(stages) == sorted(stages), "vLLM groups layers in their order"
    assert all(group.device.type == "cpu" for group in groups)
    slots = _stacked([group.slot_mapping for group in groups])
    blocks = _stacked([group.block_table for group in groups])
    tables.__class__ = StageBlockTables
    assert isinstance(tables, StageBlockTables)
    tables.himap_step_plan = None
    tables.himap_slots = slots
    tables.himap_blocks = blocks
    tables._himap_tables = blocks.numpy()
    tables._himap_ends = np.stack([group.num_blocks_per_row for group in groups])
    for group, ends in zip(groups, tables._himap_ends, strict=True):
        group.num_blocks_per_row = ends
    tables._himap_stages = np.array(stages)
    bounds = np.searchsorted(stages, range(NUM_STAGES + 1)).tolist()
    tables._himap_groups = [slice(*pair) for pair in pairwise(bounds)]


def _rows(query_start_loc: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[num_tokens] the request of each token."""
    return np.repeat(np.arange(len(query_start_loc) - 1), np.diff(query_start_loc))


def _stacked(buffers: Sequence[CpuGpuBuffer]) -> torch.Tensor:
    """Return one tensor whose views become the buffers of host and device."""
    with torch.inference_mode(False):
        stacked = torch.stack([buffer.cpu for buffer in buffers])
    for buffer, view in zip(buffers, stacked, strict=True):
        buffer.cpu = buffer.gpu = view
        buffer.np = view.numpy()
    return stacked
