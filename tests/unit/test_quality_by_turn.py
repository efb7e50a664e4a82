# SPDX-License-Identifier: Apache-2.0
"""Pairs of questions, and the shares of them, in `bench.quality_by_turn`: no model."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

from himap_demo.heldout import FIRST_SEED
from himap_demo.questions import ask
from himap_demo.scenes import Scene, draw, make_scene

from bench.quality_by_turn import (
    ALL,
    ALONE,
    ONE_OBJECT,
    TURN,
    Cell,
    messages,
    pairs,
    share,
    tables,
    usable,
)
from himap_vllm.plan.prompt import Ratios
from tests.unit.test_demo_scenes import answer


def answerable(scene: Scene, question: str, right: str) -> bool:
    try:
        return answer(scene, question) == right
    except (KeyError, ValueError):  # no object, or several
        return False


def test_a_question_is_about_the_object_without_which_it_has_no_answer() -> None:
    kinds = set()
    for seed in range(300):
        scene = make_scene(seed)
        for question in ask(random.Random(seed), scene, 8, ONE_OBJECT):
            kinds.add(question.kind)
            for thing in scene.things:
                others = tuple(other for other in scene.things if other != thing)
                rest = replace(scene, things=others)
                known = answerable(rest, question.text, question.answers[0])
                assert known != (thing == question.thing), question
    assert kinds == set(ONE_OBJECT)


def test_both_questions_of_a_pair_have_objects_of_their_own() -> None:
    scenes = [make_scene(FIRST_SEED + number) for number in range(60)]
    by_picture = {draw(scene).tobytes(): scene for scene in scenes}
    drawn = list(islice(pairs(0), 40))
    assert len({pair.image.tobytes() for pair in drawn}) == 40
    for pair in drawn:
        things = by_picture[pair.image.tobytes()].things
        assert pair.first.thing in things
        assert pair.second.thing in things
        assert pair.first.thing != pair.second.thing


def test_the_first_question_comes_with_its_right_answer() -> None:
    pair = next(pairs(0))
    image = {"type": "image_pil", "image_pil": pair.image}
    first, second = (
        {"type": "text", "text": question.text} for question in (pair.first, pair.second)
    )
    assert messages(pair, ALONE) == [{"role": "user", "content": [image, second]}]
    assert messages(pair, TURN) == messages(pair, ALL) == [
        {"role": "user", "content": [image, first]},
        {"role": "assistant", "content": pair.first.answers[0]},
        {"role": "user", "content": [second]},
    ]  # fmt: skip


def test_shares_by_hand() -> None:
    ratios = Ratios(0.5, 0.75)
    unpruned = [
        Cell(None, Ratios(0, 0), ALONE, [1, 1, 1, 0, 1], 0),
        Cell(None, Ratios(0, 0), TURN, [1, 0, 1, 1, 1], 5),
    ]
    assert usable(unpruned) == [0, 2, 4]
    turn = Cell("himap", ratios, TURN, [1, 0, 0, 0], 3)
    every = Cell("himap", ratios, ALL, [1, 1, 0, 0], 0)
    assert share(None) is None
    own, over = share(turn), share(turn, every)
    assert own is not None
    assert over is not None
    assert (own.value, over.value) == (0.25, 0.5)
    alone = Cell("himap", ratios, ALONE, [1, 1, 1, 1], 0)
    uniform = [replace(cell, criterion="uniform") for cell in (alone, turn)]
    (table,) = tables([*unpruned, alone, turn, every, *uniform]).values()
    himap, free = (line.split(" | ") for line in table.splitlines()[2:])
    assert [cell.split(" %")[0] for cell in himap[1:]] == ["100.0", "25.0", "50.0", "50.0", "75"]
    assert [cell.split(" %")[0] for cell in free[1:]] == ["100.0", "25.0", "-", "-", "75"]
