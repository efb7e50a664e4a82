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
    images = [image((2, 12)), image((20, 23), (24, 27))]
    own = make_plan(60, images, [Ratios(0, 0), Ratios(0.5, 0.5)])
    assert own is not None
    assert own.counts == ((10, 10, 10), (6, 3, 2))
    assert own.removed == (0, 3, 4)
    plan = make_plan(60, images, Ratios(0.5, 0.5))
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
    ("num_computed", "num_new", "step_limit", "later", "allowed"),
    [
        (0, 30, 64, 50, 30),  # all at once
        (0, 35, 64, 50, 35),  # recomputation with generated tokens
        (30, 1, 64, 50, 1),  # decode
        # A later step has room for all of it, once the other prefills are done.
        (0, 25, 64, 50, 0),
        (0, 8, 64, 50, 0),
        (8, 21, 64, 50, 0),
        (10, 19, 24, 24, 0),
        # Too many decode for all of it at once, but not for the 20 tokens from the image on.
        (0, 25, 32, 25, 10),
        (0, 10, 32, 20, 10),
        (4, 6, 32, 25, 6),
        (10, 19, 32, 19, 0),  # at the image: wait
        # The text has no room now. It will have, or there never is room for all of the text.
        (0, 8, 32, 25, 0),
        # The one-step part may find no room for long.
        (0, 19, 32, 19, 0),
        (0, 10, 32, 5, 0),
        # Never fits as a whole: the text before the image is chunked as usual.
        (0, 8, 24, 24, 8),
        (0, 24, 24, 24, 10),
        (4, 24, 24, 20, 6),
        (10, 20, 24, 24, 20),
    ],
)
def test_chunks_never_split_the_one_step_part(
    num_computed: int, num_new: int, step_limit: int, later: int, allowed: int
) -> None:
    plan = make_plan(30, [image((10, 20))], Ratios(0.5, 0.5))
    assert plan is not None
    assert plan.chunk(num_computed, num_new, step_limit, later) == allowed


def test_a_long_text_before_the_image_is_chunked_while_others_decode() -> None:
    """20 decodes in steps of 256: a prompt of 246 tokens, of which 46 from the image on."""
    late = make_plan(246, [image((200, 230))], Ratios(0.5, 0.5))
    assert late is not None
    assert late.chunk(0, 236, 256, 236) == 200
    assert late.chunk(200, 46, 256, 236) == 46
    later = make_plan(246, [image((240, 244))], Ratios(0.5, 0.5))
    assert later is not None
    assert later.chunk(0, 236, 256, 236) == 236  # the text has no room in any step


@pytest.mark.parametrize("num_decoding", range(0, 60, 7))
def test_no_prompt_starves_while_others_decode(num_decoding: int) -> None:
    """Each begins at once if its one-step part fits beside those that decode, and it ends."""
    limit = 64
    for num_tokens in range(2, 120):
        for start in range(num_tokens - 1):
            plan = make_plan(num_tokens, [image((start, num_tokens))], Ratios(0.5, 0.5))
            room = limit - num_decoding
            if plan is None or not 0 < plan.one_step_tokens <= room:
                continue
            computed = steps = 0
            while computed < num_tokens:
                new = plan.chunk(computed, min(num_tokens - computed, room), limit, room)
                assert new > 0
                computed += new
                steps += 1
            assert steps <= -(-start // room) + 1


def test_no_plan_where_nothing_is_dropped() -> None:
    assert make_plan(30, [], Ratios(0.5, 0.5)) is None
    assert make_plan(30, [image((3, 20))], Ratios(0, 0)) is None
    assert make_plan(30, [image((3, 4))], Ratios(0.9, 0.9)) is None  # one token always stays
