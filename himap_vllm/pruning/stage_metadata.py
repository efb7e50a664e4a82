# SPDX-License-Identifier: Apache-2.0
"""A step's attention metadata as the layers of one stage see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from himap_vllm.plan.step_layout import StageBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StageAttentionMetadata:
    """The parts that differ from vLLM's own. The runner supplies block tables and slot mappings.

    Attributes:
        seq_lens: [>= num_reqs] int32, on the device.
        seq_lens_cpu: the same on the host. None: vLLM's value is right.
        batch: the stage's batch, on the host. None: vLLM's maxima hold, as in a full CUDA graph.
        query_start_loc: [num_reqs + 1] int32, on the device. None: the stage has every new token of
            the step, as in each step that prunes nothing.
    """

    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None = None
    batch: StageBatch | None = None
    query_start_loc: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: StageBatch, device: torch.device, prunes: bool) -> StageAttentionMetadata:
        """Make the metadata of a stage's batch, in tensors of its own."""
        seq_lens = torch.from_numpy(batch.seq_lens)
        query_start_loc = None
        if prunes:
            query_start_loc = torch.from_numpy(batch.query_start_loc).to(device)
        return cls(seq_lens.to(device), seq_lens, batch, query_start_loc)

    def apply(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Return a copy of `common` for this stage.

        * `vllm.v1.attention.backend.CommonAttentionMetadata` (read): a stage has its own lengths
          and rows, and vLLM has no method that derives one from another. Remove when: vLLM offers
          one.
        """
        common = shallow_copy(common)
        common.seq_lens = self.seq_lens[: common.num_reqs]
        if self.seq_lens_cpu is not None:
            common.seq_lens_cpu_upper_bound = self.seq_lens_cpu[: common.num_reqs]
        batch = self.batch
        if batch is not None:
            common.max_seq_len = batch.max_seq_len
            if self.query_start_loc is not None:
                common.query_start_loc = self.query_start_loc
                common.query_start_loc_cpu = torch.from_numpy(batch.query_start_loc)
                common.num_actual_tokens = batch.num_tokens
                common.max_query_len = batch.max_query_len
        # These describe stage 0. No builder of a supported backend needs them.
        common.positions = None
        common._num_computed_tokens_cache = None
        common._token_to_req_indices_cache = None
        return common


def shallow_copy(metadata: T) -> T:
    """`copy.copy` of an object without slots, in a third of its time."""
    copied = object.__new__(type(metadata))
    copied.__dict__.update(metadata.__dict__)
    return copied
