# SPDX-License-Identifier: Apache-2.0
"""A step's attention metadata as the layers of one stage see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from himap_vllm.plan.step import StageBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueryRows:
    """The new tokens of a step that are left in a stage.

    Attributes:
        query_start_loc: [num_reqs + 1] int32, on the device.
        query_start_loc_cpu: the same on the host.
        num_tokens: rows of the step.
        max_query_len: most rows of one request.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    num_tokens: int
    max_query_len: int


@dataclass(frozen=True, slots=True)
class StageView:
    """What differs from vLLM's own view; block tables and slot mappings are the runner's.

    Attributes:
        seq_lens: [>= num_reqs] int32, on the device.
        seq_lens_cpu: the same on the host; None: as vLLM has it.
        max_seq_len: the longest; None: as vLLM has it.
        queries: None: as vLLM has them, which is so in every step that prunes nothing.
    """

    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None = None
    max_seq_len: int | None = None
    queries: QueryRows | None = None

    @classmethod
    def of(cls, batch: StageBatch, device: torch.device, prunes: bool) -> StageView:
        """A view with tensors of its own, of a step that prunes or does not."""
        seq_lens = torch.from_numpy(batch.seq_lens)
        queries = None
        if prunes:
            query_start_loc = torch.from_numpy(batch.query_start_loc)
            queries = QueryRows(
                query_start_loc=query_start_loc.to(device),
                query_start_loc_cpu=query_start_loc,
                num_tokens=batch.num_tokens,
                max_query_len=batch.max_query_len,
            )
        return cls(
            seq_lens=seq_lens.to(device),
            seq_lens_cpu=seq_lens,
            max_seq_len=batch.max_seq_len,
            queries=queries,
        )

    def apply(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A copy of `common` with this view's batch."""
        common = shallow_copy(common)
        common.seq_lens = self.seq_lens[: common.num_reqs]
        if self.seq_lens_cpu is not None:
            common.seq_lens_cpu_upper_bound = self.seq_lens_cpu[: common.num_reqs]
        if self.max_seq_len is not None:
            common.max_seq_len = self.max_seq_len
        if self.queries is not None:
            common.query_start_loc = self.queries.query_start_loc
            common.query_start_loc_cpu = self.queries.query_start_loc_cpu
            common.num_actual_tokens = self.queries.num_tokens
            common.max_query_len = self.queries.max_query_len
        # In terms of stage 0; no builder of a supported backend wants them.
        common.positions = None
        common._num_computed_tokens_cache = None
        common._token_to_req_indices_cache = None
        return common


def shallow_copy(metadata: T) -> T:
    """`copy.copy` of an object without slots, in a third of its time."""
    copied = object.__new__(type(metadata))
    copied.__dict__.update(metadata.__dict__)
    return copied
