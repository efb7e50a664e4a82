# SPDX-License-Identifier: Apache-2.0
"""Step plans against a token-by-token simulation, and selection against plain sorting."""

import random

import numpy as np
import pytest
import torch

from himap_vllm.criteria.text_rows import text_rows
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios, make_plan
from himap_vllm.plan.step_layout import Cut, PrunedUnit, plan_step
from himap_vllm.plan.table import ActivePlans
from himap_vllm.pruning.selection import compact, surviving_rows
from tests.unit.test_prompt_plan import random_plan


def plan_with(
    num_tokens: int, *images: tuple[tuple[int, int], ...], ratios: tuple[float, float] = (0.5, 0.5)
) -> PromptPlan:
    plan = make_plan(num_tokens, [ImageTokens(runs) for runs in images], Ratios(*ratios))
    assert plan is not None
    return plan


def test_batch_of_a_mixed_step() -> None:
    """Unpruned prefill, pruned prefill, decode of a pruned prompt, text before an image."""
    plan = plan_with(20, ((4, 14),), ratios=(0.5, 0.75))  # 10 -> 5 -> 2
    step = plan_step([3, 0, 25, 0], [2, 20, 1, 4], [None, plan, plan, plan])
    first, middle, last = step.stages
    assert first.query_start_loc.tolist() == [0, 2, 22, 23, 27]
    assert middle.query_start_loc.tolist() == [0, 2, 17, 18, 22]
    assert last.query_start_loc.tolist() == [0, 2, 14, 15, 19]
    assert first.seq_lens.tolist() == [5, 20, 26, 4]
    assert middle.seq_lens.tolist() == [5, 15, 21, 4]
    assert last.seq_lens.tolist() == [5, 12, 18, 4]
    assert last.positions.tolist() == [3, 4, *range(12), 17, 0, 1, 2, 3]
    assert step.cuts is not None
    assert [request.request for request in step.cuts[0].units] == [1]


def test_step_without_a_pruned_prompt_has_no_cuts() -> None:
    plan = plan_with(20, ((4, 14),))
    assert plan_step([20], [1], [plan]).cuts is None
    assert plan_step([0], [4], [plan]).cuts is None


def test_a_plan_table_lays_out_what_its_plans_do() -> None:
    """Whatever came and went before; and a kernel can read its arrays by their addresses."""
    plans = {
        f"request {n}": plan_with(n, ((2, n - 3),), ratios=(0.5, n / 100)) for n in range(10, 40)
    }
    table = ActivePlans()
    assert table.plan_step(["unknown"], [0], [5]) is None
    for name, plan in plans.items():
        table.add(name, plan)
    for name in list(plans)[::2]:
        table.discard(name)
    table.discard("unknown")
    assert len(table) == 15
    table.add("request 10", plans["request 10"])
    names = ["request 11", "unknown", "request 21", "request 10", "request 33", "request 12"]
    num_computed, num_new = [0, 4, 30, 0, 2, 0], [11, 9, 1, 15, 31, 12]
    chosen = [plans.get(name) for name in names]
    chosen[-1] = None  # discarded
    expected = plan_step(num_computed, num_new, chosen)
    step = table.plan_step(names, num_computed, num_new)
    assert step is not None
    assert step.cuts is not None
    assert expected.cuts is not None
    for stage, wanted in zip(step.stages, expected.stages, strict=True):
        for name in ("query_start_loc", "seq_lens", "positions"):
            array = getattr(stage, name)
            assert array.tolist() == getattr(wanted, name).tolist()
            assert array.flags.c_contiguous
    requests = [request.request for request in step.cuts[0].units]
    assert requests == [request.request for request in expected.cuts[0].units] == [0, 3, 4]
    assert table["request 33"] is plans["request 33"]


@pytest.mark.parametrize(("num_computed", "num_new"), [(0, 19), (0, 5), (5, 15), (4, 15), (13, 7)])
def test_a_split_prompt_is_an_error(num_computed: int, num_new: int) -> None:
    with pytest.raises(ValueError, match="splits the one-step part"):
        plan_step([num_computed], [num_new], [plan_with(20, ((4, 14),))])


def test_a_chunk_may_begin_behind_images_that_were_found() -> None:
    """The prefix cache had the prompt without its last token, or without its last words."""
    for num_computed, num_new in ((19, 1), (15, 5), (15, 2), (14, 3)):
        plan = plan_with(20, ((4, 14),))
        step = plan_step([num_computed], [num_new], [plan])
        assert not step.prunes
        for stage, gone in zip(step.stages, plan.removed, strict=True):
            assert stage.num_tokens == num_new
            assert stage.seq_lens.tolist() == [num_computed + num_new - gone]
        assert plan.chunk(num_computed, num_new, 64, 64) == num_new


def votes_of(plan: PromptPlan, num_computed: int, num_new: int) -> list[list[int]]:
    """Prompt positions that vote for each image at the first cut."""
    cuts = plan_step([num_computed], [num_new], [plan]).cuts
    assert cuts is not None
    (request,) = cuts[0].units
    assert request.rows is not None
    return [(request.rows[vote.rows] + num_computed).tolist() for vote in request.votes]


def test_text_rows_vote_for_the_images_before_them() -> None:
    plan = plan_with(20, ((2, 6),), ((8, 12),))
    after_second = list(range(12, 20))
    assert votes_of(plan, 0, 20) == [[6, 7, *after_second], after_second]
    assert votes_of(plan, 2, 18) == [[6, 7, *after_second], after_second]
    # Generated tokens of a recomputed request don't vote.
    assert votes_of(plan, 0, 25) == votes_of(plan, 0, 20)


def test_image_without_text_after_it_is_voted_on_by_the_last_row() -> None:
    assert votes_of(plan_with(10, ((4, 10),)), 0, 10) == [[9]]
    trailing = plan_with(14, ((1, 5),), ((7, 10),), ((10, 14),))
    assert votes_of(trailing, 0, 14) == [[5, 6], [13], [13]]


def test_structure_tokens_between_runs_are_text() -> None:
    plan = plan_with(12, ((2, 4), (5, 7)), ((8, 10),))
    assert votes_of(plan, 0, 12) == [[7, 10, 11], [10, 11]]
    cuts = plan_step([0], [12], [plan]).cuts
    assert cuts is not None
    assert cuts[0].image_tokens is not None
    assert cuts[0].image_tokens.tolist() == [2, 3, 5, 6, 8, 9]


def survivors(cut: Cut, scores: torch.Tensor, num_tokens: int) -> torch.Tensor:
    assert cut.image_tokens is not None
    arrays = (cut.image_tokens, cut.padded, cut.keep, cut.protected)
    image_tokens, padded, keep, protected = map(torch.from_numpy, arrays)
    return surviving_rows(scores, image_tokens, num_tokens, padded, keep, protected, cut.num_tokens)


def test_selection_equals_sorting_each_image() -> None:
    rng = np.random.default_rng(0)
    plans = [
        plan_with(30, ((2, 12),), ((15, 22),), ratios=(0.4, 0.5)),
        None,
        plan_with(25, ((0, 4), (5, 9)), ratios=(0.9, 0.0)),
    ]
    step = plan_step([0, 7, 0], [30, 3, 25], plans)
    assert step.cuts is not None
    cut = step.cuts[0]
    assert cut.image_tokens is not None
    for _ in range(20):
        # Few distinct values: most decisions are ties.
        scores = rng.integers(0, 4, cut.num_image_tokens).astype(np.float32)
        rows = survivors(cut, torch.from_numpy(scores), 58)
        expected = set(range(58)) - set(cut.image_tokens.tolist())
        for indices, keep in zip(cut.padded, cut.keep, strict=True):
            own = [int(i) for i in indices if i < cut.num_image_tokens]
            best = sorted(own, key=lambda i: (-scores[i], i))[: int(keep)]
            expected |= {int(cut.image_tokens[i]) for i in best}
        assert rows.tolist() == sorted(expected)


def test_the_last_row_of_a_prompt_survives() -> None:
    step = plan_step([0], [10], [plan_with(10, ((4, 10),))])
    assert step.cuts is not None
    cut = step.cuts[0]
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    rows = survivors(cut, scores, 10)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 9]


def test_compact_is_nonzero() -> None:
    mask = torch.tensor([False, True, True, False, True])
    assert compact(mask, 3).tolist() == [1, 2, 4]
    assert compact(torch.zeros(3, dtype=torch.bool), 0).tolist() == []


class Tokens:
    """A prompt as a list of tokens, each with the stages that it comes to."""

    def __init__(self, plan: PromptPlan, rng: random.Random) -> None:
        self.plan = plan
        self.gone: list[set[int]] = [set(), set(), set()]
        for image, (count, shallow, deep) in zip(plan.images, plan.counts, strict=True):
            own = [p for run in image.runs for p in range(*run)]
            rng.shuffle(own)
            self.gone[1] |= set(own[: count - shallow])
            self.gone[2] |= set(own[: count - deep])
        length = plan.num_prompt_tokens + 9
        self.bounds = [n for n in range(length) if plan.unit_at(n) is None]

    def alive(self, stage: int, begin: int, end: int) -> list[int]:
        return [p for p in range(begin, end) if p not in self.gone[stage]]


class Batch:
    """A step of such prompts, and the (request, place) of each row, by stage."""

    def __init__(self, rng: random.Random) -> None:
        self.requests = [Tokens(random_plan(rng), rng) for _ in range(rng.randrange(1, 4))]
        self.chunks = [sorted(rng.sample(request.bounds, 2)) for request in self.requests]
        self.plans = [request.plan for request in self.requests]
        self.step = plan_step(
            [begin for begin, _ in self.chunks],
            [end - begin for begin, end in self.chunks],
            self.plans,
        )
        self.rows = [
            [
                (i, p)
                for i, (request, chunk) in enumerate(zip(self.requests, self.chunks, strict=True))
                for p in request.alive(stage, *chunk)
            ]
            for stage in range(3)
        ]
        self.pruned = [
            (i, index)
            for i, (plan, (begin, end)) in enumerate(zip(self.plans, self.chunks, strict=True))
            for index, unit in enumerate(plan.units)
            if begin <= unit.start and unit.end <= end
        ]

    def check_lengths(self) -> None:
        for stage, batch in enumerate(self.step.stages):
            own = [sum(i == j for j, _ in self.rows[stage]) for i in range(len(self.plans))]
            before = [
                len(request.alive(stage, 0, begin))
                for request, (begin, _) in zip(self.requests, self.chunks, strict=True)
            ]
            assert np.diff(batch.query_start_loc).tolist() == own
            assert batch.seq_lens.tolist() == [n + k for n, k in zip(before, own, strict=True)]
            assert batch.positions.tolist() == [
                n + place for n, k in zip(before, own, strict=True) for place in range(k)
            ]

    def check_unit(self, k: int, cuts: tuple[Cut, Cut]) -> None:
        i, index = self.pruned[k]
        request, begin, unit = self.requests[i], self.chunks[i][0], self.plans[i].units[index]
        for stage, cut in enumerate(cuts):
            own = cut.units[k]
            alive = [(i, p) for p in request.alive(stage, begin, unit.end)]
            assert self.rows[stage][own.tokens] == alive
            assert own.num_cached == len(request.alive(stage, 0, begin))
        places = [p for image in unit.images for run in image.runs for p in range(*run)]
        first = cuts[0].units[k]
        assert cuts[0].image_tokens is not None
        rows = cuts[0].image_tokens[first.image_tokens]
        assert [self.rows[0][row] for row in rows] == [(i, p) for p in places]
        assert first.rows is not None
        for image, vote in zip(unit.images, first.votes, strict=True):
            text = [p for p in range(image.last, unit.end) if p not in places]
            assert (first.rows[vote.rows] + begin).tolist() == (text or [unit.end - 1])
        if unit.end > unit.seen:
            shallow, deep = (self.voters(s, c.units[k]) for s, c in enumerate(text_rows(cuts)))
            assert shallow == deep

    def voters(self, stage: int, unit: PrunedUnit) -> list[list[tuple[int, int]]]:
        """Of each image, with text as voters."""
        assert unit.rows is not None
        own = self.rows[stage][unit.tokens]
        return [[own[row] for row in unit.rows[vote.rows]] for vote in unit.votes]


def test_steps_against_a_list_of_tokens() -> None:
    """Any units, any chunks that split none, from any start; several units in a chunk, or none."""
    rng = random.Random(0)
    with_several = without = 0
    for _ in range(400):
        batch = Batch(rng)
        batch.check_lengths()
        pruned = [(unit.request, unit.index) for unit in batch.step.pruned_units]
        assert pruned == batch.pruned
        with_several += len(pruned) > len({i for i, _ in pruned})
        without += not pruned
        for k in range(len(pruned)):
            assert batch.step.cuts is not None
            batch.check_unit(k, batch.step.cuts)
    assert with_several > 50
    assert without > 50
