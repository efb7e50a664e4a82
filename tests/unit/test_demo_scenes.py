# SPDX-License-Identifier: Apache-2.0
"""The demo's scenes, questions and checkpoint."""

import random
import re
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
from himap_demo import MODEL_PATH
from himap_demo.heldout import FIRST_SEED, items, training_seed
from himap_demo.questions import ASK, GROUPS, KINDS, ask
from himap_demo.scenes import (
    CARD,
    CELL,
    COLORS,
    LAYOUTS,
    MAX_OBJECTS,
    SIZE,
    WORDS,
    Scene,
    Thing,
    draw,
    make_scene,
)
from transformers import PreTrainedTokenizerFast

from training.evaluate import predict
from training.tokenizer import build_tokenizer

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
CELLS = {
    f"{row} {column}".strip() or "center": (i, j)
    for i, row in enumerate(("top", "", "bottom"))
    for j, column in enumerate(("left", "", "right"))
}
STEPS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}


def called(thing: Thing | None) -> str:
    """What an answer calls an object: `a red star`, `an orange card with 30`, `nothing`."""
    if thing is None:
        return "nothing"
    words = f"{thing.color} {thing.shape}"
    words += f" with {thing.text}" if thing.shape == "card" else ""
    return ("an " if thing.color == "orange" else "a ") + words


def cell_of(thing: Thing) -> tuple[int, int]:
    return int(thing.y // CELL), int(thing.x // CELL)


def there(scene: Scene, cell: tuple[int, int]) -> Thing | None:
    """The one object in a cell."""
    found = [thing for thing in scene.things if cell_of(thing) == cell]
    if len(found) > 1:
        raise ValueError(f"{len(found)} objects at {cell}")
    return found[0] if found else None


def answer(scene: Scene, question: str) -> str:
    """The answer from the words of the question and the objects' places in pixels alone.

    Fails where the question has no answer or several.
    """
    things = scene.things

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
        present = (there(scene, cell) for cell in CELLS.values())
        *first, last = [called(thing) for thing in present if thing]
        return f"{', '.join(first)} and {last}" if first else last
    if found := re.fullmatch(r"What (color|shape) is the object at the (.*)\?", question):
        thing = there(scene, CELLS[found[2]])
        if thing is None:
            raise ValueError(f"no object at the {found[2]}")
        return str(getattr(thing, found[1]))
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
        shown = any((thing.color, thing.shape) == found.groups() for thing in things)
        return "yes" if shown else "no"
    if found := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        cell = cell_of(only(color=found[1], shape=found[2]))
        (position,) = (name for name, there in CELLS.items() if there == cell)
        return position
    if found := re.fullmatch(r"What (number|word) is on the (?:(\w+) )?card\?", question):
        (said,) = (
            thing.text
            for thing in things
            if thing.text.isdigit() == (found[1] == "number") and thing.text
            if found[2] in (None, thing.color)
        )
        return said
    return by_sides(scene, question)


def by_sides(scene: Scene, question: str) -> str:
    """The same for questions about places beside each other."""

    def only(color: str, shape: str) -> Thing:
        (thing,) = (t for t in scene.things if (t.color, t.shape) == (color, shape))
        return thing

    sides = "above|below|left of|right of"
    if found := re.fullmatch(rf"Is the (\w+) (\w+) ({sides}) the (\w+) (\w+)\?", question):
        one, other = (only(found[i], found[i + 1]) for i in (1, 4))
        down, right = STEPS[found[3]]
        distance = down * (one.y - other.y) + right * (one.x - other.x)
        assert abs(distance) > CELL / 3
        return "yes" if distance > 0 else "no"
    if found := re.fullmatch(r"What is at the (.*)\?", question):
        return called(there(scene, CELLS[found[1]]))
    found = re.fullmatch(rf"What is ({sides}) the (\w+) (\w+)\?", question)
    assert found, question
    row, column = cell_of(only(found[2], found[3]))
    down, right = STEPS[found[1]]
    assert (row + down, column + right) in CELLS.values()
    return called(there(scene, (row + down, column + right)))


def test_a_scene_is_a_function_of_its_seed() -> None:
    for seed in (0, 1, FIRST_SEED):
        assert make_scene(seed) == make_scene(seed)
        assert draw(make_scene(seed)).tobytes() == draw(make_scene(seed)).tobytes()
    assert make_scene(0) != make_scene(1)


def test_scenes_have_every_color_layout_and_number_of_objects() -> None:
    scenes = [make_scene(seed) for seed in range(400)]
    assert {len(scene.things) for scene in scenes} == set(range(1, MAX_OBJECTS + 1))
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.text for thing in things} > set(WORDS)
    assert {len(thing.text) for thing in things if thing.text.isdigit()} == {1, 2}
    small = sum(thing.small for thing in things) / len(things)
    assert 0.6 < small < 0.9


@pytest.mark.parametrize("seed", range(20))
def test_objects_are_drawn_where_the_scene_says(seed: int) -> None:
    """Every object's colour is in its box, and outside of all boxes there is no such pixel."""
    scene = make_scene(seed)
    pixels = np.asarray(draw(scene), np.float32)
    assert pixels.shape == (SIZE, SIZE, 3)
    outside = np.ones((SIZE, SIZE), dtype=bool)
    for thing in scene.things:
        left, top, right, bottom = (round(edge) for edge in thing.box)
        assert 0 <= left < right < SIZE
        assert 0 <= top < bottom < SIZE
        box = (slice(top - 1, bottom + 2), slice(left - 1, right + 2))
        near = np.abs(pixels[box] - np.array(COLORS[thing.color])).max(-1) < 3
        assert near.sum() > 0.2 * (right - left) * (bottom - top)
        outside[box] = False
    for color in COLORS.values():
        assert not (np.abs(pixels[outside] - np.array(color)).max(-1) < 3).any()


@pytest.mark.parametrize("seed", range(20))
def test_objects_do_not_touch_and_lie_clearly_in_a_cell(seed: int) -> None:
    things = make_scene(seed).things
    for thing in things:
        for at in (thing.x, thing.y):
            assert abs(at - CELL) > 3
            assert abs(at - 2 * CELL) > 3
    for one, other in combinations(things, 2):
        across = abs(one.x - other.x) - one.width - other.width
        along = abs(one.y - other.y) - one.radius - other.radius
        assert max(across, along) > 0


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
    pictures = {draw(make_scene(training_seed(index))).tobytes() for index in range(100)}
    assert not pictures & {item.image.tobytes() for item in items(100, 1)}


def test_the_answers_are_right() -> None:
    """Every question is answered from the objects' pixels by code of its own."""
    for item in items(150, 6):
        assert answer(make_scene(item.scene), item.question) == item.answers[0], item.question


def test_every_kind_is_asked_about_as_often() -> None:
    kinds = Counter(item.kind for item in items(150, 4))
    assert set(kinds) == set(KINDS) == {kind for kinds in GROUPS.values() for kind in kinds}
    # Only scenes of few objects are described.
    assert min(kinds.values()) > 600 / len(KINDS) / 4


def test_answers_cannot_be_guessed_from_the_question() -> None:
    """The most frequent answer of a kind is right in less than 60 %; of the letters, in 40 %."""
    for kind in KINDS:
        rng = random.Random(kind)
        found = (q for seed in range(600) for q in ask(rng, make_scene(seed), 1, {kind: 1.0}))
        answers = Counter(question.answers[0] for question in islice(found, 400))
        share = answers.most_common(1)[0][1] / answers.total()
        assert share < (0.4 if kind == "choice" else 0.6), kind
    assert set(ASK) == set(KINDS)


def test_the_share_of_cards() -> None:
    for cards in (0.0, 1.0):
        things = [thing for seed in range(20) for thing in make_scene(seed, cards).things]
        assert {thing.shape == CARD for thing in things} == {bool(cards)}


def test_the_tokenizer_of_training_is_the_models() -> None:
    """Its ids follow the words' frequencies, so any change to scenes or questions may move them."""
    assert (
        build_tokenizer().get_vocab()
        == PreTrainedTokenizerFast.from_pretrained(MODEL_PATH).get_vocab()
    )


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_PATH.rglob("*")) < 25e6


def test_the_checkpoint_answers() -> None:
    """Plain transformers, unpruned, without vLLM: the model alone. 16 questions, one batch."""
    said = list(predict(MODEL_PATH, items(8, 2)))
    right = sum(text in item.answers for item, text in said)
    assert right / len(said) >= 0.85
