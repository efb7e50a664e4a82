# SPDX-License-Identifier: Apache-2.0
"""The demo's scenes, questions and checkpoint."""

import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from himap_demo import MODEL_PATH
from himap_demo.heldout import FIRST_SEED, items, training_seed
from himap_demo.questions import ASK, GROUPS, KINDS, ask
from himap_demo.scenes import CELL, COLORS, MAX_OBJECTS, SIZE, Scene, Thing, draw, make_scene

from training.evaluate import predict

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
CELLS = {
    f"{row} {column}".strip() or "center": (i, j)
    for i, row in enumerate(("top", "", "bottom"))
    for j, column in enumerate(("left", "", "right"))
}
STEPS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}


def called(thing: Thing | None) -> str:
    """What an answer calls an object: `a red star`, `an orange card with 3`, `nothing`."""
    if thing is None:
        return "nothing"
    words = f"{thing.color} {thing.shape}"
    words += f" with {thing.digit}" if thing.shape == "card" else ""
    return ("an " if thing.color == "orange" else "a ") + words


def answer(scene: Scene, question: str) -> str:
    """The answer from the words of the question and the objects' places in pixels alone.

    Fails where the question has no answer or several.
    """
    place = {
        (int(thing.y // CELL), int(thing.x // CELL)): thing for thing in sorted_by_place(scene)
    }
    things = list(place.values())

    def only(**wanted: str) -> Thing:
        (thing,) = (t for t in things if all(getattr(t, k) == v for k, v in wanted.items()))
        return thing

    if chosen := re.fullmatch(r"(.*\?) A\. (.*) B\. (.*) C\. (.*) D\. (.*) Answer .*\.", question):
        (letter,) = (
            letter
            for letter, option in zip("ABCD", chosen.groups()[1:], strict=True)
            if option == answer(scene, chosen[1])
        )
        return letter
    if question == "Describe the image.":
        *first, last = [called(thing) for thing in things]
        return f"{', '.join(first)} and {last}" if first else last
    if found := re.fullmatch(r"What (color|shape) is the object at the (.*)\?", question):
        return str(getattr(place[CELLS[found[2]]], found[1]))
    if found := re.fullmatch(r"What color is the (\w+)\?", question):
        return only(shape=found[1]).color
    if found := re.fullmatch(r"What shape is the (\w+) object\?", question):
        return only(color=found[1]).shape
    if question == "How many objects are there?":
        return NUMBERS[len(things)]
    if found := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return NUMBERS[sum(thing.color == found[1] for thing in things)]
    if found := re.fullmatch(r"How many (\w+)s are there\?", question):
        shape = found[1].replace("crosse", "cross")
        return NUMBERS[sum(thing.shape == shape for thing in things)]
    if found := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        there = any((thing.color, thing.shape) == found.groups() for thing in things)
        return "yes" if there else "no"
    if found := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        thing = only(color=found[1], shape=found[2])
        cell = (int(thing.y // CELL), int(thing.x // CELL))
        (position,) = (name for name, there in CELLS.items() if there == cell)
        return position
    if question == "What number is on the card?":
        return str(only(shape="card").digit)
    if found := re.fullmatch(r"What number is on the (\w+) card\?", question):
        return str(only(color=found[1], shape="card").digit)
    if found := re.fullmatch(r"What is at the (.*)\?", question):
        return called(place.get(CELLS[found[1]]))
    found = re.fullmatch(r"What is (above|below|left of|right of) the (\w+) (\w+)\?", question)
    assert found, question
    thing = only(color=found[2], shape=found[3])
    down, right = STEPS[found[1]]
    cell = (int(thing.y // CELL) + down, int(thing.x // CELL) + right)
    assert cell in CELLS.values()
    return called(place.get(cell))


def sorted_by_place(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda thing: (thing.y // CELL, thing.x // CELL))


def test_a_scene_is_a_function_of_its_seed() -> None:
    for seed in (0, 1, FIRST_SEED):
        assert make_scene(seed) == make_scene(seed)
        assert draw(make_scene(seed)).tobytes() == draw(make_scene(seed)).tobytes()
    assert make_scene(0) != make_scene(1)


def test_scenes_have_every_color_and_number_of_objects() -> None:
    scenes = [make_scene(seed) for seed in range(300)]
    assert {len(scene.things) for scene in scenes} == set(range(1, MAX_OBJECTS + 1))
    assert {thing.color for scene in scenes for thing in scene.things} == set(COLORS)


@pytest.mark.parametrize("seed", range(20))
def test_objects_are_drawn_where_the_scene_says(seed: int) -> None:
    """A cell differs from its background by more than noise exactly where it has an object."""
    scene = make_scene(seed)
    pixels = np.asarray(draw(scene), np.float32)
    assert pixels.shape == (SIZE, SIZE, 3)
    for cell in range(9):
        row, column = divmod(cell, 3)
        shown = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        thing = scene.at(row, column)
        if thing is not None:
            near = np.abs(shown - np.array(COLORS[thing.color])).max(-1) < 3
            assert near.sum() > 150
        else:
            assert shown.std((0, 1)).max() < 25


def test_held_out_items_are_always_the_same() -> None:
    first, second = list(items(20, 3)), list(items(20, 3))
    assert [(i.question, i.answers, i.kind, i.scene) for i in first] == [
        (i.question, i.answers, i.kind, i.scene) for i in second
    ]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, second, strict=True))
    # More scenes go on where fewer stopped.
    assert [i.question for i in items(10, 3)] == [
        i.question for i in first if i.scene < FIRST_SEED + 10
    ]
    later = FIRST_SEED + 20
    assert {item.scene for item in items(5, first=20)} == set(range(later, later + 5))


def test_held_out_scenes_are_never_trained_on() -> None:
    assert {item.scene for item in items(10)} == set(range(FIRST_SEED, FIRST_SEED + 10))
    assert training_seed(FIRST_SEED - 1) < FIRST_SEED
    for index in (-1, FIRST_SEED, FIRST_SEED + 5):
        with pytest.raises(ValueError, match="training scenes"):
            training_seed(index)
    pictures = {draw(make_scene(training_seed(index))).tobytes() for index in range(200)}
    assert not pictures & {item.image.tobytes() for item in items(200, 1)}


def test_the_answers_are_right() -> None:
    """Every question is answered from the objects' pixels by code of its own."""
    for item in items(400, 3):
        assert answer(make_scene(item.scene), item.question) == item.answers[0], item.question


def test_every_kind_is_asked_about_as_often() -> None:
    kinds = Counter(item.kind for item in items(300, 2))
    assert set(kinds) == set(KINDS) == {kind for kinds in GROUPS.values() for kind in kinds}
    assert min(kinds.values()) > 600 / len(KINDS) / 2


def test_answers_cannot_be_guessed_from_the_question() -> None:
    """The most frequent answer of a kind is right in less than 60 %; of the letters, in 40 %."""
    for kind in KINDS:
        rng = random.Random(kind)
        found = (q for seed in range(600) for q in ask(rng, make_scene(seed), 1, {kind: 1.0}))
        answers = Counter(question.answers[0] for question in islice(found, 400))
        share = answers.most_common(1)[0][1] / answers.total()
        assert share < (0.4 if kind == "choice" else 0.6), kind
    assert set(ASK) == set(KINDS)


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_PATH.rglob("*")) < 25e6


def test_the_checkpoint_answers() -> None:
    """Plain transformers, unpruned, without vLLM: the model alone. 32 questions, one batch."""
    said = list(predict(MODEL_PATH, items(16, 2)))
    right = sum(text in item.answers for item, text in said)
    assert right / len(said) >= 0.85
