# SPDX-License-Identifier: Apache-2.0
"""The engine against the independent implementation: kept sets, tokens, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints import sample_images
from tests.engines import Case, watched
from tests.world import World, assert_equals_oracle

PICTURES = tuple(sample_images(8))
RATIOS = ((0.0, 0.0), (0.25, 0.5), (0.5, 0.75), (0.75, 0.25), (0.9, 0.9), (0.0, 0.5), (0.5, 0.0))
PROMPTS = {
    "one image": ("USER: <image>\nWhat is this? ASSISTANT:", 1),
    "text around": ("Some words first. <image> Then a longer question, about it. Answer:", 1),
    "two images": ("USER: <image>\n<image>\nCompare. ASSISTANT:", 2),
    "text between": ("A: <image> and now, quite different, B: <image> and C: <image> which?", 3),
    "nothing after": ("Look at this: <image>", 1),
    "two at the end": ("First <image> then<image><image>", 3),
    "starts with it": ("<image>?", 1),
}
TURNS = (
    "USER: <image>\nWhat is this? ASSISTANT: Some shape.</s>"
    "USER: And <image> or <image>? ASSISTANT: That is another one.</s>"
    "USER: Sure? ASSISTANT:"
)
AT_THE_END = "USER: <image> ASSISTANT: Nice.</s>USER: Look: <image>"


def cases() -> list[Case]:
    """Every prompt at every ratio pair, and text-only prompts between them."""
    made = []
    for i, ratios in enumerate(RATIOS):
        for j, (prompt, num_images) in enumerate(PROMPTS.values()):
            images = tuple(PICTURES[(i + j + k) % len(PICTURES)] for k in range(num_images))
            made.append(Case(prompt, images, ratios))
        made.append(Case(f"No picture here, only {i} words. Go on:", (), ratios))
    return made + cases_by_image() + conversations()


def conversations() -> list[Case]:
    """Text of an image's turn votes, or all text behind it; turns of which nothing is dropped."""
    made: list[Case] = []
    by_turn = ((0.0, 0.5, 0.25), (0.0, 0.75, 0.5)), ((0.5, 0.0, 0.0), (0.75, 0.0, 0.0))
    for ratios in ((0.5, 0.75), (0.75, 0.25), *by_turn):
        for votes in (None, "turn", "all"):
            images = PICTURES[len(made) % 5 :][:3]
            made.append(Case(TURNS, images, ratios, votes=votes))
    for votes in ("turn", "all"):
        made.append(Case(AT_THE_END, PICTURES[3:5], (0.5, 0.75), votes=votes))
    return made


def cases_by_image() -> list[Case]:
    """Each image has ratios of its own: `high`, `auto` and `low`, in several orders."""
    high, auto, low = (0.0, 0.0), (0.5, 0.75), (0.75, 0.75)
    text, end = PROMPTS["text between"][0], PROMPTS["two at the end"][0]
    made: list[Case] = []
    for prompt, images in (
        (text, (high, auto, low)),
        (end, (low, high, auto)),
        (end, (auto, low, high)),
        (text, (high, (0.5, 0.0), (0.0, 0.9))),
        (text, (high, low, high)),
    ):
        ratios = tuple(zip(*images, strict=True))
        made.append(Case(prompt, PICTURES[len(made) : len(made) + 3], (ratios[0], ratios[1])))
    return made


CASES = cases()


@pytest.mark.parametrize(
    ("shape", "compiled", "kv_grouping"),
    [
        ("mha12", False, "balanced"),
        ("gqa12", False, "many"),
        ("mha32", False, "few"),
        pytest.param("mha12", True, "balanced", marks=pytest.mark.xdist_group("compiled")),
    ],
)
def test_one_mixed_batch_equals_the_oracle(
    world: World, shape: str, compiled: bool, kv_grouping: str
) -> None:
    batch_equals_oracle(world, shape, compiled, kv_grouping, CASES)


def batch_equals_oracle(
    world: World, shape: str, compiled: bool, kv_grouping: str, cases: list[Case]
) -> None:
    """All ratios, unpruned and text-only requests; prefill and decode share steps."""
    himap = {} if kv_grouping == "balanced" else {"kv_grouping": kv_grouping}
    engine = world.engine(shape, himap=himap, compiled=compiled)
    groups = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    assert len(groups) == {"balanced": 4, "many": 6, "few": 3}[kv_grouping]
    mixed_steps = 0

    def look(output: Any) -> None:
        nonlocal mixed_steps
        prefills = {request.req_id for request in output.scheduled_new_reqs}
        decodes = output.num_scheduled_tokens.keys() - prefills
        planned = engine.scheduler.himap_plans.keys()
        mixed_steps += bool(prefills & planned and decodes & planned and decodes - planned)

    with watched(engine, look):
        outputs = engine.generate(cases)
    assert mixed_steps >= len(cases) // 20
    compared = compared_by_image = 0
    for case, output in zip(cases, outputs, strict=True):
        expected = world.oracle(shape, case)
        if min(expected.margin, expected.score_margin) < 1e-5:
            continue  # a tie within rounding: either answer is right
        assert_equals_oracle(world, engine, shape, case, output)
        compared += 1
        compared_by_image += case.ratios is not None and isinstance(case.ratios[0], tuple)
    assert compared >= 2 / 3 * len(cases)
    assert compared_by_image >= 2


def test_later_turns_do_not_change_what_was_kept(world: World) -> None:
    """But with the votes of all text they do."""
    engine = world.engine()
    kept: dict[str, list[Any]] = {"turn": [], "all": []}
    for votes, seen in kept.items():
        for until in ("Some", "That", "$"):
            prompt = TURNS.partition(until)[0]
            images = PICTURES[: prompt.count("<image>")]
            case = Case(prompt, images, (0.5, 0.75), votes=votes)
            (output,) = engine.generate([case])
            assert_equals_oracle(world, engine, "mha12", case, output)
            seen.append(engine.trace(output.request_id)["deep"])
    first, second, third = kept["turn"]
    assert [first[0], second[1:]] == [third[0], third[1:]]
    assert second[0] == first[0]
    assert kept["all"][0] == kept["turn"][0]
    assert kept["all"][2][0] != kept["turn"][2][0]
