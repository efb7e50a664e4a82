# SPDX-License-Identifier: Apache-2.0
"""The prefix cache of pruned prompts: what is published, and what a request finds.

A sequence can be taken up at a *point*, where the entries of each stage are known: the end of a
unit, the end of a prompt, and the last computed token of a request that ends or is preempted. At a
point the stages are filled to different places in their blocks. A point therefore gives the partly
filled block of each KV cache group, its tail, one more key. A request that finds a point shares the
full blocks and copies the tails, by the way that vLLM has for hits that end inside a block.

Beside points, full blocks alone carry a request to where they end in all stages. Behind the first
unit that is seldom at the end of a block, so blocks are copied there, too.

Blocks that are published in a step are filled in it. They can be shared at once, because attention
reads behind what it writes; but they can't be copied before the next step. A request waits for that
step if the copy spares it a unit, or all that it would compute. Else it makes do with what can be
copied now: a prompt of many steps publishes a block to copy in each of them.

A request that has computed a unit replaces the blocks of others that hold the same one. At a
near-tie two requests may choose different tokens, and blocks of two choices must not meet in one
sequence.

* `vllm.v1.core.block_pool.BlockPool._insert_block_hash` (called): one more key of a block.
  `cache_full_blocks` would drop the others. Remove when: a prefix can end inside a block of every
  KV cache group, at different places.
* `vllm.v1.core.block_pool.BlockPool.get_cached_block`,
  `vllm.v1.core.kv_cache_utils.make_block_hash_with_group_id` (called): look up a block by its hash.
  Remove when: a request has hashes per KV cache group.
* `vllm.v1.core.block_pool.BlockPool.emit_cached_block_events` (called): the events of the first
  stage's blocks; other stages' blocks are of no use elsewhere. Remove when: a request has hashes
  per KV cache group.
* `vllm.v1.core.block_pool.BlockPool._emit_block_removed_events` (wrapped): keys of which no event
  has told are removed in silence. Remove when: keys say whether events tell of them.
* `vllm.v1.core.block_pool.BlockPool.evict_blocks` (called): withdraws blocks that were published in
  a step that does not compute them. Remove when: vLLM withdraws the blocks of a request that it
  schedules and preempts in one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import lcm

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from himap_vllm.core.point_index import PointIndex
from himap_vllm.core.stage_hashes import MARK, HashFunction, StageHashes
from himap_vllm.core.stage_kv_cache_manager import StageKVCacheManager
from himap_vllm.plan.prompt import PromptPlan

Row = list[list[KVCacheBlock]]
"""[num_blocks][groups of a stage] cached blocks."""


class StagePrefixCache:
    """The prefix cache of the pruned requests of a scheduler."""

    def __init__(
        self,
        pool: BlockPool,
        stages: Sequence[Sequence[StageKVCacheManager]],
        plans: Mapping[str, PromptPlan],
        hash_function: HashFunction,
    ) -> None:
        self._pool = pool
        self._stages = stages
        self._plans = plans
        self._hash = hash_function
        self._sizes = [groups[0].block_size for groups in stages]
        self._ids = [[group.kv_cache_group_id for group in groups] for groups in stages]
        self._num_groups = sum(map(len, stages))
        self._hashes: dict[str, StageHashes] = {}
        self._published: dict[str, int] = {}  # tokens of which blocks are published
        self._began: dict[str, int] = {}  # tokens that were found in the cache
        self._points = PointIndex()
        self._fresh: set[int] = set()  # ids of blocks that are filled in this step
        for groups in stages:
            for group in groups:
                group.fresh = self._fresh
        if pool.enable_kv_cache_events:
            emit = pool._emit_block_removed_events

            def emit_ordinary(hashes: list[bytes]) -> None:
                emit([block_hash for block_hash in hashes if not block_hash.startswith(MARK)])

            pool._emit_block_removed_events = emit_ordinary

    def begin_step(self) -> None:
        """What was published so far can be copied."""
        self._fresh.clear()

    def clear(self) -> None:
        """Forget all points."""
        self._points.clear()

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._hashes.pop(request_id, None)
        self._published.pop(request_id, None)
        self._began.pop(request_id, None)

    def find(self, request: Request) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of a pruned request that is cached, without its last token.

        Returns:
            [num_groups] blocks of each KV cache group, and the number of tokens.
        """
        blocks, num_tokens = self._longest(request, frozenset())
        if self.must_wait(request, blocks, num_tokens):
            settled, end = self._longest(request, self._fresh)
            units = self._plans[request.request_id].units
            whole = num_tokens == request.num_tokens - 1
            if not (whole or any(end < unit.end <= num_tokens for unit in units)):
                return settled, end
        return blocks, num_tokens

    def _longest(
        self, request: Request, without: Set[int]
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """What `find` returns if blocks with the ids `without` are not there."""
        plan, hashes = self._plans[request.request_id], self._hashes_of(request)
        limit = request.num_tokens - 1
        rows = self._full_blocks(hashes, request.num_tokens, without)
        num_tokens = self._reached(plan, hashes, rows, limit)
        for point in self._candidates(plan, hashes, rows, num_tokens, request.num_tokens):
            if plan.resumable(min(point, limit)) == min(point, limit):
                with_tails = self._with_tails(plan, hashes, rows, point, without)
                if with_tails is not None:
                    rows, num_tokens = with_tails, min(point, limit)
                    break
        blocks: list[list[KVCacheBlock]] = [[] for _ in range(self._num_groups)]
        for stage, (row, ids) in enumerate(zip(rows, self._ids, strict=True)):
            count = cdiv(plan.stage_tokens(stage, num_tokens), self._sizes[stage])
            for index, group_id in enumerate(ids):
                blocks[group_id] = [found[index] for found in row[:count]]
        return tuple(blocks), num_tokens

    def must_wait(
        self, request: Request, blocks: Sequence[Sequence[KVCacheBlock]], num_tokens: int
    ) -> bool:
        """Whether a block that has to be copied is still to be filled in this step.

        Args:
            request: a pruned one.
            blocks: [num_groups] that it found.
            num_tokens: that it found.
        """
        plan = self._plans[request.request_id]
        return any(
            blocks[group_id] and blocks[group_id][-1].block_id in self._fresh
            for stage, ids in enumerate(self._ids)
            if plan.stage_tokens(stage, num_tokens) % self._sizes[stage]
            for group_id in ids
        )

    def publish(self, request: Request, start: int, end: int) -> None:
        """Publish what a step computes of a pruned request: the chunk [start, end)."""
        plan = self._plans[request.request_id]
        end = min(end, request.num_tokens)
        self._published[request.request_id] = end
        self._began.setdefault(request.request_id, start)
        self._publish_blocks(request, end, fresh=True)
        points = {unit.end for unit in plan.units} | {plan.num_prompt_tokens}
        for point in sorted(points):
            if start < point <= end:
                self._publish_point(request, point, fresh=True)

    def publish_rest(self, request: Request) -> None:
        """Publish what is computed of a request whose blocks are about to be freed.

        Of any request, pruned or not, withdraw what this step was to compute.
        """
        computed = min(request.num_computed_tokens, request.num_tokens)
        self._withdraw(request, computed)
        plan = self._plans.get(request.request_id)
        point = min(computed, request.num_computed_tokens - request.num_output_placeholders)
        if plan is not None and point > 0 and plan.resumable(point) == point:
            self._publish_blocks(request, point, fresh=False)
            if plan.unit_at(point) is None:
                self._publish_point(request, point, fresh=False)
        self._began.pop(request.request_id, None)

    def _hashes_of(self, request: Request) -> StageHashes:
        request_id = request.request_id
        hashes = self._hashes.get(request_id)
        if hashes is None:
            hashes = self._hashes[request_id] = StageHashes(
                request,
                self._plans[request_id],
                self._sizes,
                self._pool.hash_block_size,
                self._hash,
            )
        return hashes

    def _cached(
        self, block_hash: BlockHash, ids: list[int], without: Set[int]
    ) -> list[KVCacheBlock] | None:
        """The blocks of some groups with a hash, or None if one is not cached."""
        found: list[KVCacheBlock] | None = self._pool.get_cached_block(block_hash, ids)
        if found is not None and any(block.block_id in without for block in found):
            return None
        return found

    def _full_blocks(self, hashes: StageHashes, num_tokens: int, without: Set[int]) -> list[Row]:
        """The full blocks of each stage that are cached, from the first on without a gap."""
        rows: list[Row] = []
        reach = num_tokens
        for stage, ids in enumerate(self._ids):
            row: Row = []
            for index in range(hashes.num_full(stage, num_tokens)):
                # Blocks that a unit fills are full at the same place, its end.
                if index and hashes.end(stage, index) > hashes.end(stage, index - 1) >= reach:
                    break
                found = self._cached(hashes.of_block(stage, index), ids, without)
                if found is None:
                    break
                row.append(found)
            rows.append(row)
            if stage == 0:  # with a tail, the first stage reaches a little farther
                reach = min(reach, (len(row) + 1) * self._sizes[0])
        return rows

    def _reached(
        self, plan: PromptPlan, hashes: StageHashes, rows: Sequence[Row], limit: int
    ) -> int:
        """How far full blocks carry all stages."""
        reached = limit
        for stage, row in enumerate(rows):
            end = hashes.end(stage, len(row) - 1) if row else 0
            if stage and plan.stage_tokens(stage, end) > len(row) * self._sizes[stage]:
                # Full at the end of a unit that goes on in the next block.
                end = next(unit.start for unit in plan.units if unit.end == end)
            reached = min(reached, end)
        reached = plan.resumable(reached)
        if reached <= plan.first_image_token:  # as in stock vLLM, without a copy
            reached -= reached % lcm(*self._sizes)
        return reached

    def _candidates(
        self,
        plan: PromptPlan,
        hashes: StageHashes,
        rows: Sequence[Row],
        reached: int,
        num_tokens: int,
    ) -> list[int]:
        """Points behind `reached` that may be cached, farthest first."""
        size = self._sizes[0]
        found = {unit.end for unit in plan.units} | {plan.num_prompt_tokens}
        for count in range(len(rows[0]), -1, -1):
            found.update(self._points.behind(hashes.of_block(0, count - 1) if count else b""))
            if count * size <= reached:
                break
        farthest = min(num_tokens, (len(rows[0]) + 1) * size - 1)
        return sorted(
            (
                point
                for point in found
                if reached < min(point, num_tokens - 1) and point <= farthest
            ),
            reverse=True,
        )

    def _with_tails(
        self,
        plan: PromptPlan,
        hashes: StageHashes,
        rows: Sequence[Row],
        point: int,
        without: Set[int],
    ) -> list[Row] | None:
        """The blocks of each stage up to a point, or None if some are not cached."""
        if plan.unit_at(point) is not None:
            return None
        found = []
        for stage, (row, size) in enumerate(zip(rows, self._sizes, strict=True)):
            count, rest = divmod(plan.stage_tokens(stage, point), size)
            if len(row) < count:
                return None
            up_to = row[: count + (rest > 0)]
            if rest and len(row) == count:
                tail_hash = hashes.tail(stage, point)
                assert tail_hash is not None
                tail = self._cached(tail_hash, self._ids[stage], without)
                if tail is None:
                    return None
                up_to.append(tail)
            found.append(up_to)
        return found

    def _publish_blocks(self, request: Request, num_tokens: int, fresh: bool) -> None:
        """Publish the full blocks of a request's first `num_tokens` tokens."""
        request_id, hashes = request.request_id, self._hashes_of(request)
        for stage, groups in enumerate(self._stages):
            cached = groups[0].num_cached_block.get(request_id, 0)
            full = hashes.num_full(stage, num_tokens)
            if full <= cached:
                continue
            for index in range(cached, full):
                self._replace(request, stage, index, hashes.of_block(stage, index))
            for group in groups:
                blocks = group.req_to_blocks[request_id]
                for index in range(cached, full):
                    self._insert(
                        hashes.of_block(stage, index), group, blocks[index],
                        hashes.end(stage, index), fresh,
                    )  # fmt: skip
                group.num_cached_block[request_id] = full
                if stage == 0:
                    self._pool.emit_cached_block_events(
                        request, full, group.block_size, group.kv_cache_group_id
                    )

    def _publish_point(self, request: Request, num_tokens: int, fresh: bool) -> None:
        """Make a point known, with the tails of all groups."""
        plan, hashes = self._plans[request.request_id], self._hashes_of(request)
        for stage, groups in enumerate(self._stages):
            tail_hash = hashes.tail(stage, num_tokens)
            if tail_hash is None:
                continue
            index = plan.stage_tokens(stage, num_tokens) // self._sizes[stage]
            self._replace(request, stage, index, tail_hash)
            for group in groups:
                if self._pool.get_cached_block(tail_hash, [group.kv_cache_group_id]) is None:
                    block = group.req_to_blocks[request.request_id][index]
                    self._insert(tail_hash, group, block, num_tokens, fresh)
        count = hashes.num_full(0, num_tokens)
        self._points.add(hashes.of_block(0, count - 1) if count else b"", num_tokens)

    def _replace(self, request: Request, stage: int, index: int, block_hash: BlockHash) -> None:
        """Withdraw others' blocks with a hash, if what they hold depends on this request's choice.

        That is all from the first unit on that it computed, in the later stages.
        """
        request_id = request.request_id
        plan, began = self._plans[request_id], self._began.get(request_id, 0)
        first = next((unit.start for unit in plan.units if unit.start >= began), None)
        if first is None or not stage:
            return
        if (index + 1) * self._sizes[stage] <= plan.stage_tokens(stage, first):
            return
        for group in self._stages[stage]:
            own = group.req_to_blocks[request_id][index]
            found = self._pool.get_cached_block(block_hash, [group.kv_cache_group_id])
            while found is not None and found[0] is not own:
                self._pool.evict_blocks({found[0].block_id})
                found = self._pool.get_cached_block(block_hash, [group.kv_cache_group_id])

    def _insert(
        self,
        block_hash: BlockHash,
        group: StageKVCacheManager,
        block: KVCacheBlock,
        num_tokens: int,
        fresh: bool,
    ) -> None:
        key = make_block_hash_with_group_id(block_hash, group.kv_cache_group_id)
        self._pool._insert_block_hash(key, block, num_tokens=num_tokens)
        if fresh:
            self._fresh.add(block.block_id)

    def _withdraw(self, request: Request, num_computed: int) -> None:
        """Withdraw blocks that were published in this step, which does not compute them now.

        A scheduler with priorities may preempt a request that it has scheduled in the same step.
        """
        request_id = request.request_id
        plan = self._plans.get(request_id)
        if plan is not None and self._published.pop(request_id, 0) <= num_computed:
            return
        unfilled: set[int] = set()
        for stage, groups in enumerate(self._stages):
            entries = num_computed if plan is None else plan.stage_tokens(stage, num_computed)
            full = entries // self._sizes[stage]
            for group in groups:
                if plan is not None or group.num_cached_block.get(request_id, 0) > full:
                    blocks = group.req_to_blocks.get(request_id, ())
                    unfilled.update(block.block_id for block in blocks[full:])
        if unfilled:
            self._pool.evict_blocks(unfilled)
