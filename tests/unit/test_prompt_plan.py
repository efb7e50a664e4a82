# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of plans, without vLLM."""

import random

import pytest

from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios, kept, make_plan


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
    assert plan.longest_unit == 606


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
    for inside in (11, 19):
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
            if plan is None or not 0 < plan.longest_unit <= room:
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


def test_units_have_their_own_images() -> None:
    images = [image((2, 6)), image((8, 12)), image((20, 30)), image((33, 41))]
    ratios = [Ratios(0.5, 0.5), Ratios(0, 0), Ratios(0, 0), Ratios(0.5, 0.75)]
    plan = make_plan(60, images, ratios, [15, 15, 32, 50])
    assert plan is not None
    first, second = plan.units  # the one between drops nothing
    assert (first.start, first.seen, first.end) == (2, 12, 15)
    assert first.counts == ((4, 2, 1), (4, 4, 4))
    assert (second.start, second.seen, second.end) == (33, 41, 50)
    assert second.removed == (0, 4, 7)
    assert plan.counts == ((4, 2, 1), (4, 4, 4), (10, 10, 10), (8, 4, 1))
    assert plan.removed == (0, 6, 10)
    assert plan.longest_unit == 17
    inside = {3: first, 14: first, 34: second}
    assert all(plan.unit_at(n) is inside.get(n) for n in (2, 3, 14, 15, 31, 34, 50))
    assert plan.units_between(0, 15) == [0]
    assert plan.units_between(15, 33) == []
    assert plan.units_between(2, 55) == [0, 1]
    with pytest.raises(ValueError, match=r"splits the one-step part \[33, 50\)"):
        plan.units_between(15, 34)


@pytest.mark.parametrize("ends", [(5, 20), (20, 10), (9, 31), (15, 30)])
def test_units_that_overlap_are_an_error(ends: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is not inside"):
        make_plan(30, [image((2, 6)), image((12, 20))], Ratios(0.5, 0.5), ends)


def random_plan(rng: random.Random) -> PromptPlan:
    """Images with text between, before and behind; some share a unit, some drop nothing."""
    images, ratios, ends, place = [], [], [], rng.randrange(6)
    for _ in range(rng.randrange(1, 5)):
        group = []
        for _ in range(rng.randrange(1, 4)):
            begin = place
            place += rng.randrange(1, 12)
            runs = [(begin, place)]
            if rng.random() < 0.3:  # a row break
                runs.append((place + 1, place + 4))
                place += 4
            group.append(image(*runs))
            place += rng.choice([0, 0, 1, 5])
        place = group[-1].last + 1 + rng.choice([0, 0, 1, 7])
        images += group
        ratios += [Ratios(rng.choice([0, 0.5]), rng.choice([0, 0.75])) for _ in group]
        ends += [place] * len(group)
        place += rng.choice([0, 0, 2, 20])
    plan = make_plan(place + 1, images, ratios, ends)
    return plan or random_plan(rng)


def test_stages_against_a_list_of_tokens() -> None:
    """Whichever tokens survive, each boundary has as many entries as the list says."""
    rng = random.Random(0)
    for _ in range(300):
        plan = random_plan(rng)
        dropped: list[set[int]] = [set(), set(), set()]
        for one, (count, shallow, deep) in zip(plan.images, plan.counts, strict=True):
            own = [p for run in one.runs for p in range(*run)]
            rng.shuffle(own)
            dropped[1] |= set(own[: count - shallow])
            dropped[2] |= set(own[: count - deep])
        for stage in range(3):
            entries = [p for p in range(plan.num_prompt_tokens + 9) if p not in dropped[stage]]
            for n in range(plan.num_prompt_tokens + 9):
                inside = any(unit.start < n < unit.end for unit in plan.units)
                assert (plan.unit_at(n) is not None) == inside
                among = [u.start for u in plan.units if u.start < n < u.seen]
                assert plan.resumable(n) == (among or [n])[0]
                if among:
                    with pytest.raises(ValueError, match="one-step part"):
                        plan.stage_tokens(stage, n)
                    continue
                num_entries = sum(p < n for p in entries)
                assert plan.stage_tokens(stage, n) == num_entries
                assert plan.position(stage, num_entries) <= n
                # No later than the unit's end, and exact where no token of a unit is behind.
                if n == 0 or not any(unit.seen == n for unit in plan.units):
                    assert plan.position(stage, num_entries) == n


def test_chunks_never_split_a_unit_and_end() -> None:
    """Whatever room the steps have, from any boundary, with room for the longest unit at times."""
    rng = random.Random(1)
    for _ in range(2000):
        plan = random_plan(rng)
        limit = max(plan.longest_unit, 8) + rng.randrange(20)
        num_decoding = rng.randrange(0, limit - plan.longest_unit + 1)
        computed = rng.randrange(plan.num_prompt_tokens)
        computed = unit.end if (unit := plan.unit_at(computed)) else computed
        later = limit - num_decoding
        waited = 0
        while computed < plan.num_prompt_tokens:
            room = later if waited else rng.randrange(1, later + 1)
            new = plan.chunk(computed, min(plan.num_prompt_tokens - computed, room), limit, later)
            assert 0 <= new <= room
            assert plan.unit_at(computed + new) is None
            assert new or not waited  # the step for which it waited has come
            waited = waited + 1 if new == 0 else 0
            computed += new


def test_text_between_units_runs_as_in_vllm() -> None:
    plan = make_plan(300, [image((10, 20)), image((150, 160))], Ratios(0.5, 0.5), [30, 170])
    assert plan is not None
    assert plan.chunk(0, 64, 64, 64) == 64  # the first unit and the text behind it
    assert plan.chunk(64, 64, 64, 64) == 64
    assert plan.chunk(128, 64, 64, 64) == 64  # the second unit and the text behind it
    assert plan.chunk(0, 155, 256, 256) == 150  # up to the second unit
    assert plan.chunk(128, 30, 64, 40) == 22  # the text before it; with it, later may be too short
    assert plan.chunk(128, 30, 64, 64) == 0  # a later step has room for both
    assert plan.chunk(192, 5, 64, 64) == 5
