# SPDX-License-Identifier: Apache-2.0
"""Hashes of a pruned request's blocks, by stage.

The first stage never sees pruning: its blocks have vLLM's ordinary hashes. So have those of the
later stages before the first unit. From there on a block of a later stage holds other tokens than
its place says, and the request grows a list of hashes of its own. Each hash is made of the hash
before it, the tokens from where that block was full to where this one is, and of each unit that
ends between the two: where it lies and how many tokens each of its images keeps. Which tokens those
are is a function of what is hashed and of the engine's settings.

A block is *full at* a position of the sequence. Which block a token of a unit lies in depends on
the data, so blocks that end inside a unit are full at its end.

A *tail* is a block that is partly filled at a position where a sequence can be taken up.

* `vllm.v1.core.kv_cache_utils.hash_block_tokens`,
  `vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys` (called): the same hashes of images,
  adapters, salts and embeddings as ordinary blocks have. Remove when: a request has hashes per KV
  cache group.
* `vllm.v1.request.Request.block_hashes` (read): the ordinary hashes. Remove when: a request has
  hashes per KV cache group.
* `vllm.multimodal.utils.get_mm_features_in_window` (called): the images of a range. Remove when:
  `generate_block_hash_extra_keys` searches by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.multimodal.utils import get_mm_features_in_window
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)
from vllm.v1.request import Request

from himap_vllm.plan.prompt import PromptPlan, Unit

MARK = b"himap"
"""Begins each hash that is not an ordinary one."""

HashFunction = Callable[[Any], bytes]


@dataclass(slots=True)
class _Chain:
    """The blocks of one stage.

    Attributes:
        hashes: of full blocks.
        ends: where they are full.
        num_units: units that end before the next block begins.
        removed: tokens that are missing in these.
    """

    hashes: list[BlockHash] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    num_units: int = 0
    removed: int = 0

    def next_end(self, stage: int, num_entries: int, units: Sequence[Unit]) -> int:
        """The position at which a block that ends with the `num_entries`th entry is full."""
        while self.num_units < len(units):
            unit = units[self.num_units]
            if num_entries + self.removed <= unit.start:
                break
            if num_entries + self.removed + unit.removed[stage] <= unit.end:
                return unit.end
            self.removed += unit.removed[stage]
            self.num_units += 1
        return num_entries + self.removed


class StageHashes:
    """The hashes of one pruned request. They grow with its tokens."""

    def __init__(
        self,
        request: Request,
        plan: PromptPlan,
        block_sizes: Sequence[int],
        hash_block_size: int,
        hash_function: HashFunction,
    ) -> None:
        self._request = request
        self._plan = plan
        self._sizes = block_sizes
        self._hash_block_size = hash_block_size
        self._hash = hash_function
        self._chains = [_Chain() for _ in block_sizes]
        self._tails: dict[tuple[int, int], BlockHash | None] = {}

    def num_full(self, stage: int, num_tokens: int) -> int:
        """Blocks of a stage that are full when the first `num_tokens` tokens are computed."""
        chain = self._chains[stage]
        while (end := self._next_end(stage)) <= num_tokens:
            start = chain.ends[-1] if chain.ends else 0
            if stage == 0 or end <= self._plan.first_image_token:
                block_hash = self._request.block_hashes[end // self._hash_block_size - 1]
            else:
                parent = chain.hashes[-1] if chain.hashes else None
                block_hash = self._chained(stage, parent, start, end)
            chain.hashes.append(block_hash)
            chain.ends.append(end)
        return bisect_right(chain.ends, num_tokens)

    def of_block(self, stage: int, index: int) -> BlockHash:
        """The hash of a full block that `num_full` has counted."""
        return self._chains[stage].hashes[index]

    def end(self, stage: int, index: int) -> int:
        """Where that block is full."""
        return self._chains[stage].ends[index]

    def tail(self, stage: int, num_tokens: int) -> BlockHash | None:
        """The hash of the block that the first `num_tokens` tokens fill partly; None: none is."""
        key = stage, num_tokens
        if key not in self._tails:
            num_full, rest = divmod(self._plan.stage_tokens(stage, num_tokens), self._sizes[stage])
            self._tails[key] = None
            if rest:
                self.num_full(stage, num_tokens)
                parent = self.of_block(stage, num_full - 1) if num_full else None
                start = self.end(stage, num_full - 1) if num_full else 0
                self._tails[key] = self._chained(stage, parent, start, num_tokens, ("tail",))
        return self._tails[key]

    def _next_end(self, stage: int) -> int:
        chain = self._chains[stage]
        num_entries = (len(chain.ends) + 1) * self._sizes[stage]
        return chain.next_end(stage, num_entries, self._plan.units) if stage else num_entries

    def _chained(
        self, stage: int, parent: BlockHash | None, start: int, end: int, keys: tuple[Any, ...] = ()
    ) -> BlockHash:
        """The hash of a block with the tokens [start, end), and of the units that end there."""
        request, plan = self._request, self._plan
        first, _ = get_mm_features_in_window(request.mm_features, start, end)
        extra, _ = generate_block_hash_extra_keys(request, start, end, first)
        units: tuple[Any, ...] = ()
        if stage:  # the first stage holds all tokens
            units = tuple(
                (
                    unit.start,
                    unit.end,
                    plan.protects(unit),
                    tuple(count[: stage + 1] for count in unit.counts),
                )
                for unit in plan.units
                if start < unit.end <= end
            )
        tokens = request.all_token_ids[start:end]
        block_hash = hash_block_tokens(
            self._hash, parent, tokens, (*(extra or ()), "himap", stage, *keys, *units)
        )
        return BlockHash(MARK + block_hash)
