# SPDX-License-Identifier: Apache-2.0
from typing import Any, TypeAlias

import torch

def __getattr__(name: str) -> Any: ...

BlockTable: TypeAlias = Any

class MultiGroupBlockTable:
    block_tables: list[Any]

    def append_row(self, block_ids: tuple[list[int], ...], row_idx: int) -> None: ...
    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None: ...
    def commit_block_table(self, num_reqs: int) -> None: ...
    def __getitem__(self, idx: int) -> BlockTable: ...
