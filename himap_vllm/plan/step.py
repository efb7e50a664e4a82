# SPDX-License-Identifier: Apache-2.0
"""The layout of one step: token ranges, sequence lengths, cuts.

This is integer arithmetic on the host, before the forward pass, without torch and vLLM. Index
spaces:

* *prompt*: position in a request's sequence, text and image tokens alike;
* *stage s*: position in a request's KV sequence of stage s, after the cuts before it;
* *step s*: row in the step's flat batch as stage s sees it (requests concatenated);
* *flat images s*: the image tokens of all pruned prompts of the step that enter cut s,
  concatenated in batch order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himap_vllm.plan.prompt import NUM_STAGES, ImageTokens, PromptPlan
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
        """[num_tokens] KV position of each new token, in stage s; computed on first use."""
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
class PrunedRequest:
    """One pruned prompt at one cut.

    Attributes:
        request: row in the batch.
        tokens: the request's rows in step s.
        num_cached: KV entries computed in earlier steps (all of them before the first image).
        image_tokens: slice of flat images s.
        rows: [num_rows] voting rows relative to `tokens`, or None: the image tokens themselves.
        votes: per image, in order; slices relative to `rows` and to `image_tokens`.
        seed: the plan's.
    """

    request: int
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
        requests: the prompts pruned in this step.
        image_tokens: [num flat images s] their rows in step s. None at the second cut: there the
            rows depend on the data (their number does not).
        padded: [num_images, longest image] index into flat images s; padding points one past it.
        keep: [num_images] tokens that survive.
        protected: indices into flat images s that survive whatever their score: a prompt's last
            row, where the next token is read, if an image token stands there.
        num_tokens: rows of step s + 1.
    """

    requests: tuple[PrunedRequest, ...]
    image_tokens: IntArray | None
    padded: IntArray
    keep: IntArray
    protected: IntArray
    num_tokens: int

    @property
    def num_image_tokens(self) -> int:
        return int(self.requests[-1].image_tokens.stop)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: its batch per stage, and the cuts if a prompt is pruned in it."""

    stages: tuple[StageBatch, StageBatch, StageBatch]
    cuts: tuple[Cut, Cut] | None

    @property
    def prunes(self) -> bool:
        """Whether a prompt is pruned in this step."""
        return self.cuts is not None

    @property
    def pruned_requests(self) -> tuple[PrunedRequest, ...]:
        """The prompts that are pruned in this step, as the first cut has them."""
        return () if self.cuts is None else self.cuts[0].requests


@dataclass(frozen=True, slots=True)
class PlanArrays:
    """Plans by row, as arrays. A row without a plan has values that change nothing.

    Attributes:
        first_image: [num_rows] tokens before the first image token.
        num_prompt: [num_rows] tokens of the prompt.
        removed: [NUM_STAGES, num_rows] tokens of the prompt that are gone in each stage.
    """

    first_image: IntArray
    num_prompt: IntArray
    removed: IntArray

    @classmethod
    def empty(cls, num_rows: int) -> PlanArrays:
        """Rows without plans."""
        return cls(
            first_image=np.full(num_rows, np.iinfo(np.int64).max),
            num_prompt=np.zeros(num_rows, dtype=np.int64),
            removed=np.zeros((NUM_STAGES, num_rows), dtype=np.int64),
        )

    def put(self, row: int, plan: PromptPlan) -> None:
        """Write a plan into a row."""
        self.first_image[row] = plan.first_image_token
        self.num_prompt[row] = plan.num_prompt_tokens
        self.removed[:, row] = plan.removed

    def take(self, rows: IntArray) -> PlanArrays:
        """A copy of some rows."""
        return PlanArrays(self.first_image[rows], self.num_prompt[rows], self.removed[:, rows])


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
        ValueError: a chunk of a pruned prompt ends inside its one-step part.
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
    reached = end > plans.first_image
    past = reached & (start >= plans.num_prompt)
    pruned = np.flatnonzero(reached & ~past)
    split = pruned[
        (start[pruned] > plans.first_image[pruned]) | (end[pruned] < plans.num_prompt[pruned])
    ]
    if len(split):
        row = split[0]
        raise ValueError(
            f"a chunk [{start[row]}, {end[row]}) splits the one-step part "
            f"[{plans.first_image[row]}, {plans.num_prompt[row]}) of a pruned prompt"
        )
    starts = start - plans.removed * past
    ends = end - plans.removed * reached
    lengths = ends - starts
    query_start_loc = np.zeros((NUM_STAGES, len(start) + 1), dtype=np.int32)
    np.cumsum(lengths, axis=1, out=query_start_loc[:, 1:])
    # In C order, because kernels read a stage's row by its address.
    seq_lens = ends.astype(np.int32, order="C")
    stages = tuple(
        StageBatch(query_start_loc=query_start_loc[stage], seq_lens=seq_lens[stage])
        for stage in range(NUM_STAGES)
    )
    cuts = None
    if len(pruned):
        chosen = [(row, plan) for row in pruned.tolist() if (plan := plan_of_row(row)) is not None]
        cuts = (_first_cut(chosen, start, stages), _second_cut(chosen, start, stages))
    return StepPlan(stages=stages, cuts=cuts)  # type: ignore[arg-type]


def _first_cut(
    pruned: Sequence[tuple[int, PromptPlan]],
    start: IntArray,
    stages: Sequence[StageBatch],
) -> Cut:
    """The cut at which text votes."""
    requests, image_tokens, protected = [], [], []
    offset = 0
    for row, plan in pruned:
        computed = int(start[row])
        tokens = _rows(stages[0], row)
        positions = np.concatenate([_positions(image) for image in plan.images])
        image_tokens.append(positions - computed + tokens.start)
        rows, votes = text_votes(plan, positions)
        requests.append(
            PrunedRequest(
                request=row,
                tokens=tokens,
                num_cached=computed,
                image_tokens=slice(offset, offset + len(positions)),
                rows=rows - computed,
                votes=votes,
                seed=plan.seed(0),
            )
        )
        offset += len(positions)
        if plan.images[-1].last == plan.num_prompt_tokens - 1:
            protected.append(offset - 1)
    return _cut(pruned, 0, requests, np.concatenate(image_tokens), protected, stages)


def _second_cut(
    pruned: Sequence[tuple[int, PromptPlan]],
    start: IntArray,
    stages: Sequence[StageBatch],
) -> Cut:
    """The cut at which images vote."""
    requests, protected = [], []
    offset = 0
    for row, plan in pruned:
        votes = own_votes(plan)
        count = votes[-1].tokens.stop
        requests.append(
            PrunedRequest(
                request=row,
                tokens=_rows(stages[1], row),
                num_cached=int(start[row]),
                image_tokens=slice(offset, offset + count),
                rows=None,
                votes=votes,
                seed=plan.seed(0),
            )
        )
        offset += count
        if plan.images[-1].last == plan.num_prompt_tokens - 1:
            protected.append(offset - 1)
    return _cut(pruned, 1, requests, None, protected, stages)


def _cut(
    pruned: Sequence[tuple[int, PromptPlan]],
    index: int,
    requests: Sequence[PrunedRequest],
    image_tokens: IntArray | None,
    protected: Sequence[int],
    stages: Sequence[StageBatch],
) -> Cut:
    counts = np.array([count for _, plan in pruned for count in plan.counts], dtype=np.int64)
    entering, keep = counts[:, index], counts[:, index + 1]
    first = np.cumsum(entering) - entering
    column = np.arange(entering.max())
    padded = np.where(column < entering[:, None], first[:, None] + column, entering.sum())
    return Cut(
        requests=tuple(requests),
        image_tokens=image_tokens,
        padded=padded,
        keep=keep,
        protected=np.array(protected, dtype=np.int64),
        num_tokens=stages[index + 1].num_tokens,
    )


def _rows(batch: StageBatch, row: int) -> slice:
    return slice(int(batch.query_start_loc[row]), int(batch.query_start_loc[row + 1]))


def _positions(image: ImageTokens) -> IntArray:
    return np.concatenate([np.arange(*run, dtype=np.int64) for run in image.runs])
