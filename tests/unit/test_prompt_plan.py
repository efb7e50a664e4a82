# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of plans, without vLLM."""

import pytest

from himap_vllm.plan.prompt import ImageTokens, Ratios, kept, make_plan


def image(*runs: tuple[int, int]) -> ImageTokens:
    return ImageTokens(runs)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "expected"),
    [
        (576, 0.5, 288),
        (288, 0.75, 72),
        (10, 0.9, 1),  # 10 * 0.9 is 9.000000000000002 or 8.999...: the epsilon decides for 9
        (10, 0.7, 3),  # 10 * 0.7 is 7.000000000000001
        (1000, 0.29, 710),  # 1000 * 0.29 is 289.99999999999994
        (1, 0.99, 1),
        (3, 0.999, 1),
        (7, 0.0, 7),
    ],
)
def test_kept(num_tokens: int, ratio: float, expected: int) -> None:
    assert kept(num_tokens, ratio) == expected


def test_paper_budget_of_llava() -> None:
    plan = make_plan(611, [image((5, 581))], Ratios(0.5, 0.75))
    assert plan is not None
    assert plan.counts == ((576, 288, 72),)
    assert plan.removed == (0, 288, 504)
    assert plan.one_step_tokens == 606


def test_each_image_keeps_its_own_share() -> None:
    plan = make_plan(60, [image((2, 12)), image((20, 23), (24, 27))], Ratios(0.5, 0.5))
    assert plan is not None
    assert plan.counts == ((10, 5, 3), (6, 3, 2))
    assert plan.removed == (0, 8, 11)


def test_stage_tokens_count_what_reaches_the_stage() -> None:
    plan = make_plan(30, [image((10, 20))], Ratios(0.5, 0.75))
    assert plan is not None
    assert [plan.stage_tokens(stage, 10) for stage in range(3)] == [10, 10, 10]
    assert [plan.stage_tokens(stage, 30) for stage in range(3)] == [30, 25, 22]
    assert [plan.stage_tokens(stage, 37) for stage in range(3)] == [37, 32, 29]
    for inside in (11, 29):
        with pytest.raises(ValueError, match="one-step part"):
            plan.stage_tokens(2, inside)


@pytest.mark.parametrize(
    ("num_computed", "num_new", "step_limit", "allowed"),
    [
        (0, 30, 64, 30),  # all at once
        (0, 35, 64, 35),  # recomputation with generated tokens
        (30, 1, 64, 1),  # decode
        # Fits a step as a whole: not begun in a lesser one.
        (0, 25, 64, 0),
        (0, 8, 64, 0),
        (8, 21, 64, 0),
        (10, 19, 24, 0),
        # Never fits as a whole: the text before the image is chunked as usual.
        (0, 8, 24, 8),
        (0, 24, 24, 10),
        (4, 24, 24, 6),
        (10, 20, 24, 20),
    ],
)
def test_chunks_never_split_the_one_step_part(
    num_computed: int, num_new: int, step_limit: int, allowed: int
) -> None:
    plan = make_plan(30, [image((10, 20))], Ratios(0.5, 0.5))
    assert plan is not None
    assert plan.chunk(num_computed, num_new, step_limit) == allowed


def test_no_plan_where_nothing_is_dropped() -> None:
    assert make_plan(30, [], Ratios(0.5, 0.5)) is None
    assert make_plan(30, [image((3, 20))], Ratios(0, 0)) is None
    assert make_plan(30, [image((3, 4))], Ratios(0.9, 0.9)) is None  # one token always stays
