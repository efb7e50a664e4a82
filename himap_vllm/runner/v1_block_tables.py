# SPDX-License-Identifier: Apache-2.0
"""Block tables of a stage's KV cache groups as one array, for Model Runner V1, which runs on CPUs.

vLLM looks up the slots of a step's tokens group by group, with one kernel launch each. The groups
of a stage differ only in their block ids, so one NumPy lookup serves all of them.

* `vllm.v1.worker.block_table.MultiGroupBlockTable` (subclassed): `InputBatch.block_table` is one;
  the buffers of its groups become views of the arrays. Remove when: Model Runner V1 goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable

from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step_layout import StepPlan


@dataclass(frozen=True, slots=True)
class _StageTables:
    """The block tables of one stage's groups.

    Attributes:
        groups: of the stage.
        block_size: tokens per block.
        blocks: [groups, max_num_reqs, max_num_blocks] int32.
        table: the same.
    """

    groups: slice
    block_size: int
    blocks: torch.Tensor
    table: npt.NDArray[np.int32]


class StageBlockTables(MultiGroupBlockTable):
    """vLLM's block tables, for groups in the order of their stages.

    Attributes:
        himap_step_plan: of the step that is prepared; None if every stage sees the same tokens.
        himap_slots: [num_groups, max_num_tokens] int64, the slots of the step's tokens.
    """

    himap_step_plan: StepPlan | None
    himap_slots: torch.Tensor
    _himap_stages: Sequence[_StageTables]
    _himap_ends: npt.NDArray[np.int32]  # [num_groups, max_num_reqs] blocks of each row

    @override
    def append_row(self, block_ids: tuple[list[int], ...], row_idx: int) -> None:
        """As `MultiGroupBlockTable.append_row`; the groups of a stage get equally many blocks."""
        for stage in self._himap_stages:
            groups = stage.groups
            count = len(block_ids[groups.start])
            if count:
                start = int(self._himap_ends[groups.start, row_idx])
                stage.table[:, row_idx, start : start + count] = block_ids[groups]
                self._himap_ends[groups, row_idx] = start + count

    @override
    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """As `MultiGroupBlockTable.compute_slot_mapping`, but each stage has its own tokens."""
        plan = self.himap_step_plan
        if plan is not None and plan.prunes:
            for tables, stage in zip(self._himap_stages, plan.stages, strict=True):
                self._look_up(tables, _rows(stage.query_start_loc), stage.positions)
            return
        # Every stage has the same tokens, at positions that differ by the dropped tokens.
        rows, where = _rows(query_start_loc[: num_reqs + 1].numpy()), positions.numpy()
        for index, tables in enumerate(self._himap_stages):
            own = where
            if plan is not None and index:
                first, later = plan.stages[0].seq_lens, plan.stages[index].seq_lens
                own = where - (first - later)[rows]
            self._look_up(tables, rows, own)

    def _look_up(
        self, tables: _StageTables, rows: npt.NDArray[Any], positions: npt.NDArray[Any]
    ) -> None:
        """Slots of a stage's tokens: `rows` and `positions` are [num_tokens]."""
        blocks, offsets = np.divmod(positions, tables.block_size)
        slots = self.himap_slots.numpy()[tables.groups, : len(rows)]
        np.multiply(tables.table[:, rows, blocks], tables.block_size, out=slots, dtype=np.int64)
        slots += offsets

    def himap_tables(self, num_reqs: int, num_rows: int) -> list[torch.Tensor]:
        """[num_groups] the first `num_rows` rows of each table, those behind `num_reqs` nulled."""
        for stage in self._himap_stages:
            stage.blocks[:, num_reqs:num_rows] = NULL_BLOCK_ID
        return [
            table for stage in self._himap_stages for table in stage.blocks[:, :num_rows].unbind()
        ]

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
    ends = np.stack([group.num_blocks_per_row for group in groups])
    for group, own in zip(groups, ends, strict=True):
        group.num_blocks_per_row = own
    bounds = np.searchsorted(stages, range(NUM_STAGES + 1)).tolist()
    of_stages = []
    for start, stop in pairwise(bounds):
        blocks = _stacked([group.block_table for group in groups[start:stop]])
        (block_size,) = {group.block_size for group in groups[start:stop]}
        of_stages.append(_StageTables(slice(start, stop), block_size, blocks, blocks.numpy()))
    tables.__class__ = StageBlockTables
    assert isinstance(tables, StageBlockTables)
    tables.himap_step_plan = None
    tables.himap_slots = slots
    tables._himap_stages = of_stages
    tables._himap_ends = ends


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
