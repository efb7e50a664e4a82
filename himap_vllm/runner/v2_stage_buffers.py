# SPDX-License-Identifier: Apache-2.0
"""Batches of the later stages in persistent tensors, for Model Runner V2.

* `vllm.utils.torch_utils.async_tensor_h2d` (called): copies to the device without waiting for it.
  Remove when: torch stages copies from pageable memory itself.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step_layout import StepPlan
from himap_vllm.pruning.stage_metadata import StageAttentionMetadata

_ALIGNMENT = 64  # elements


class StageBuffers:
    """Persistent buffers: a captured CUDA graph reads sequence lengths at the captured addresses.

    Lengths and first rows are adjacent, so that one copy fills them. Each stage's part is aligned
    like a tensor of its own.

    Attributes:
        seq_lens: [NUM_STAGES - 1, max_num_reqs] int32.
        query_start_loc: [NUM_STAGES - 1, > max_num_reqs] int32.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._half = -(-(max_num_reqs + 1) // _ALIGNMENT) * _ALIGNMENT
        shape = (NUM_STAGES - 1, 2 * self._half)
        self._tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        self.seq_lens = self._tensor[:, :max_num_reqs]
        self.query_start_loc = self._tensor[:, self._half :]

    def copy(self, plan: StepPlan) -> None:
        """Copy from the host without waiting. Requests that only pad the batch get length 0."""
        packed = np.zeros(self._tensor.shape, dtype=np.int32)
        for row, stage in zip(packed, plan.stages[1:], strict=True):
            num_reqs = len(stage.seq_lens)
            row[:num_reqs] = stage.seq_lens
            row[self._half :][: num_reqs + 1] = stage.query_start_loc
        async_tensor_h2d(packed, out=self._tensor)

    def copy_first_stage(self, seq_lens: torch.Tensor) -> None:
        """Copy the first stage's lengths, for a step in which the stages do not differ."""
        self.seq_lens[:, : len(seq_lens)] = seq_lens

    def metadata(self, plan: StepPlan | None) -> list[StageAttentionMetadata]:
        """[NUM_STAGES - 1] what builders are told of the later stages.

        Args:
            plan: what was copied last; None: the first stage's lengths.
        """
        if plan is None:
            return [StageAttentionMetadata(seq_lens) for seq_lens in self.seq_lens]
        later = []
        for index, batch in enumerate(plan.stages[1:]):
            num_reqs = len(batch.seq_lens)
            query_start_loc = self.query_start_loc[index, : num_reqs + 1] if plan.prunes else None
            later.append(
                StageAttentionMetadata(
                    self.seq_lens[index], batch=batch, query_start_loc=query_start_loc
                )
            )
        return later
