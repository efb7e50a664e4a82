# SPDX-License-Identifier: Apache-2.0
"""The layout of one step: token ranges, sequence lengths, cuts.

This is integer arithmetic on the host, before the forward pass, without torch and vLLM. Index
spaces:

* *prompt*: position in a request's sequence, text and image tokens alike;
* *stage s*: position in a request's KV sequence of stage s, after the cuts before it;
* *step s*: row in the step's flat batch as stage s sees it (requests concatenated);
* *flat images s*: the image tokens of all units pruned in the step that enter cut s, concatenated
  in batch order, units of one prompt in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himap_vllm.plan.prompt import NUM_STAGES, ImageTokens, PromptPlan, Unit
from himap_vllm.plan.voters import ImageVote, IntArray, own_votes, text_votes

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StageBatch:
    """The step as the layers of one stage see it.

    Attributes:
        query_start_loc: [num_reqs + 1] first row of each request, in step s.
        seq_lens: [num_reqs] KV entries of each request after this step, in stage s.
    """

    query_start_loc: Int32Array
    seq_lens: Int32Array

    @property
    def positions(self) -> IntArray:
        """[num_tokens] KV position of each new token, in stage s."""
        lengths = np.diff(self.query_start_loc)
        first = self.seq_lens - self.query_start_loc[1:]
        return np.repeat(first, lengths) + np.arange(self.num_tokens, dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def max_query_len(self) -> int:
        return int(np.diff(self.query_start_loc).max())

    @property
    def max_seq_len(self) -> int:
        return int(self.seq_lens.max())


@dataclass(frozen=True, slots=True)
class PrunedUnit:
    """One unit of a prompt at one cut.

    Attributes:
        request: row in the batch.
        index: of the unit in the prompt's plan.
        tokens: the request's rows in step s, up to the unit's end.
        num_cached: KV entries computed in earlier steps, in stage s.
        image_tokens: slice of flat images s.
        rows: [num_rows] voting rows relative to `tokens`, or None: the image tokens themselves.
        votes: per image, in order; slices relative to `rows` and to `image_tokens`.
        seed: the unit's.
    """

    request: int
    index: int
    tokens: slice
    num_cached: int
    image_tokens: slice
    rows: IntArray | None
    votes: tuple[ImageVote, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut of one step; cut s leads from stage s to stage s + 1.

    Attributes:
        units: those pruned in this step.
        image_tokens: [num flat images s] their rows in step s. None at the second cut: there the
            rows depend on the data (their number does not).
        padded: [num_images, longest image] index into flat images s; padding points one past it.
        keep: [num_images] tokens that survive.
        protected: indices into flat images s that survive whatever their score: a prompt's last
            row, where the next token is read, if an image token stands there.
        num_tokens: rows of step s + 1.
    """

    units: tuple[PrunedUnit, ...]
    image_tokens: IntArray | None
    padded: IntArray
    keep: IntArray
    protected: IntArray
    num_tokens: int

    @property
    def num_image_tokens(self) -> int:
        return int(self.units[-1].image_tokens.stop)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: its batch per stage, and the cuts if a unit is pruned in it."""

    stages: tuple[StageBatch, StageBatch, StageBatch]
    cuts: tuple[Cut, Cut] | None

    @property
    def prunes(self) -> bool:
        """Whether a unit is pruned in this step."""
        return self.cuts is not None

    @property
    def pruned_units(self) -> tuple[PrunedUnit, ...]:
        """The units that are pruned in this step, as the first cut has them."""
        return () if self.cuts is None else self.cuts[0].units


@dataclass(frozen=True, slots=True)
class PlanArrays:
    """Plans by row, as arrays. A row without a plan has values that change nothing.

    Attributes:
        first_start: [num_rows] where the first unit begins.
        last_end: [num_rows] where the last unit ends.
        removed: [NUM_STAGES, num_rows] tokens of the prompt that are gone in each stage.
    """

    first_start: IntArray
    last_end: IntArray
    removed: IntArray

    @classmethod
    def empty(cls, num_rows: int) -> PlanArrays:
        """Rows without plans."""
        return cls(
            first_start=np.full(num_rows, np.iinfo(np.int64).max),
            last_end=np.zeros(num_rows, dtype=np.int64),
            removed=np.zeros((NUM_STAGES, num_rows), dtype=np.int64),
        )

    def put(self, row: int, plan: PromptPlan) -> None:
        """Write a plan into a row."""
        self.first_start[row] = plan.first_image_token
        self.last_end[row] = plan.last_end
        self.removed[:, row] = plan.removed

    def take(self, rows: IntArray) -> PlanArrays:
        """A copy of some rows."""
        return PlanArrays(self.first_start[rows], self.last_end[rows], self.removed[:, rows])


def plan_step(
    num_computed: npt.ArrayLike,
    num_scheduled: npt.ArrayLike,
    plans: Sequence[PromptPlan | None],
) -> StepPlan:
    """Plan one step of a continuous batch.

    Args:
        num_computed: [num_reqs] tokens computed before this step.
        num_scheduled: [num_reqs] tokens of this step.
        plans: [num_reqs] None for requests that run unpruned.

    Raises:
        ValueError: a chunk of a pruned prompt splits a unit.
    """
    arrays = PlanArrays.empty(len(plans))
    for row, plan in enumerate(plans):
        if plan is not None:
            arrays.put(row, plan)
    return plan_batch(num_computed, num_scheduled, arrays, plans.__getitem__)


def plan_batch(
    num_computed: npt.ArrayLike,
    num_scheduled: npt.ArrayLike,
    plans: PlanArrays,
    plan_of_row: Callable[[int], PromptPlan | None],
) -> StepPlan:
    """Like `plan_step`, for requests whose plans are already rows of arrays."""
    start = np.asarray(num_computed, dtype=np.int64)
    end = start + np.asarray(num_scheduled, dtype=np.int64)
    reached = end > plans.first_start
    past = reached & (start >= plans.last_end)
    gone = plans.removed * past
    starts, ends = start - gone, end - gone
    chunks = []
    # Those that prefill: the units before and in a chunk depend on where it lies.
    for row in np.flatnonzero(reached & ~past).tolist():
        plan = plan_of_row(row)
        assert plan is not None
        begin, behind = int(start[row]), int(end[row])
        units = plan.units_between(begin, behind)
        for stage in range(1, NUM_STAGES):
            starts[stage, row] = plan.stage_tokens(stage, begin)
            ends[stage, row] = plan.stage_tokens(stage, behind)
        if units:
            chunks.append(_Chunk(row, plan, begin, units, (begin, int(starts[1, row]))))
    query_start_loc = np.zeros((NUM_STAGES, len(start) + 1), dtype=np.int32)
    np.cumsum(ends - starts, axis=1, out=query_start_loc[:, 1:])
    # In C order, because kernels read a stage's row by its address.
    seq_lens = ends.astype(np.int32, order="C")
    stages = tuple(
        StageBatch(query_start_loc=query_start_loc[stage], seq_lens=seq_lens[stage])
        for stage in range(NUM_STAGES)
    )
    cuts = (_first_cut(chunks, stages), _second_cut(chunks, stages)) if chunks else None
    return StepPlan(stages=stages, cuts=cuts)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk that holds units.

    Attributes:
        row: in the batch.
        plan: of the prompt.
        start: tokens computed before.
        units: indices into the plan's.
        num_cached: KV entries before the chunk, in stages 0 and 1.
    """

    row: int
    plan: PromptPlan
    start: int
    units: Sequence[int]
    num_cached: tuple[int, int]

    def rows(self, stage: int, batch: StageBatch, unit: Unit) -> tuple[slice, int]:
        """The request's rows up to a unit's end, and its KV entries before them, in a stage."""
        first = int(batch.query_start_loc[self.row])
        num_cached = self.num_cached[stage]
        last = first + self.plan.stage_tokens(stage, unit.end) - num_cached
        return slice(first, last), num_cached


def _first_cut(chunks: Sequence[_Chunk], stages: Sequence[StageBatch]) -> Cut:
    """The cut at which text votes."""
    units, image_tokens = [], []
    offset = 0
    for chunk in chunks:
        for index in chunk.units:
            unit = chunk.plan.units[index]
            tokens, num_cached = chunk.rows(0, stages[0], unit)
            positions = np.concatenate([_positions(image) for image in unit.images])
            image_tokens.append(positions - chunk.start + tokens.start)
            rows, votes = text_votes(unit, positions)
            units.append(
                PrunedUnit(
                    request=chunk.row,
                    index=index,
                    tokens=tokens,
                    num_cached=num_cached,
                    image_tokens=slice(offset, offset + len(positions)),
                    rows=rows - chunk.start,
                    votes=votes,
                    seed=chunk.plan.seed(index),
                )
            )
            offset += len(positions)
    return _cut(chunks, 0, units, np.concatenate(image_tokens), stages)


def _second_cut(chunks: Sequence[_Chunk], stages: Sequence[StageBatch]) -> Cut:
    """The cut at which images vote."""
    units = []
    offset = 0
    for chunk in chunks:
        for index in chunk.units:
            unit = chunk.plan.units[index]
            tokens, num_cached = chunk.rows(1, stages[1], unit)
            votes = own_votes(unit)
            count = votes[-1].tokens.stop
            units.append(
                PrunedUnit(
                    request=chunk.row,
                    index=index,
                    tokens=tokens,
                    num_cached=num_cached,
                    image_tokens=slice(offset, offset + count),
                    rows=None,
                    votes=votes,
                    seed=chunk.plan.seed(index),
                )
            )
            offset += count
    return _cut(chunks, 1, units, None, stages)


def _cut(
    chunks: Sequence[_Chunk],
    index: int,
    units: Sequence[PrunedUnit],
    image_tokens: IntArray | None,
    stages: Sequence[StageBatch],
) -> Cut:
    planned = [(chunk.plan, chunk.plan.units[i]) for chunk in chunks for i in chunk.units]
    counts = np.array([count for _, unit in planned for count in unit.counts], dtype=np.int64)
    entering, keep = counts[:, index], counts[:, index + 1]
    first = np.cumsum(entering) - entering
    column = np.arange(entering.max())
    padded = np.where(column < entering[:, None], first[:, None] + column, entering.sum())
    protected = [
        at_cut.image_tokens.stop - 1
        for at_cut, (plan, unit) in zip(units, planned, strict=True)
        if plan.protects(unit)
    ]
    return Cut(
        units=tuple(units),
        image_tokens=image_tokens,
        padded=padded,
        keep=keep,
        protected=np.array(protected, dtype=np.int64),
        num_tokens=stages[index + 1].num_tokens,
    )


def _positions(image: ImageTokens) -> IntArray:
    return np.concatenate([np.arange(*run, dtype=np.int64) for run in image.runs])
