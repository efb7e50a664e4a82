# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, each with the answers that are accepted.

Four groups, those of the HiMAP paper's data sets: short answers (`color`, `shape`, `count`,
`exists`, `where`, `digit`), multiple choice (`choice`, answered by the letter), captions
(`caption`) and open questions answered by a phrase (`open`). A question is asked only where it has
one answer: "What color is the star?" needs a scene with exactly one star.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scenes import CARD, COLORS, GRID, POSITIONS, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
LETTERS = "ABCD"
BESIDE = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
"""Neighbouring cells: rows and columns from the object named to the one asked for."""

GROUPS = {
    "short answer": ("color", "shape", "count", "exists", "where", "digit"),
    "multiple choice": ("choice",),
    "captions": ("caption",),
    "open questions": ("open",),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)


@dataclass(frozen=True)
class Question:
    """`answers[0]` is what the model is taught to say; the others mean the same."""

    text: str
    answers: tuple[str, ...]
    kind: str


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name(thing: Thing) -> str:
    """`red star`, `blue card with 7`."""
    suffix = "" if thing.digit is None else f" with {thing.digit}"
    return f"{thing.color} {thing.shape}{suffix}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def describe(scene: Scene) -> str:
    """The caption: every object in reading order."""
    names = [article(name(thing)) for thing in scene.things]
    return (", ".join(names[:-1]) + " and " if names[:-1] else "") + names[-1]


def _unique(things: Iterable[Thing], key: Callable[[Thing], object]) -> list[Thing]:
    """The objects that share `key` with no other."""
    things = list(things)
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def _one_shape(scene: Scene) -> list[Thing]:
    """The objects that their shape alone names. Cards are asked for by their digit instead."""
    return [thing for thing in _unique(scene.things, lambda t: t.shape) if thing.shape != CARD]


def _color(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.3:
        thing = rng.choice(scene.things)
        return _short("color", f"What color is the object at the {thing.position}?", thing.color)
    if named := _one_shape(scene):
        thing = rng.choice(named)
        return _short("color", f"What color is the {thing.shape}?", thing.color)
    return None


def _shape(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.3:
        thing = rng.choice(scene.things)
        return _short("shape", f"What shape is the object at the {thing.position}?", thing.shape)
    if named := _unique(scene.things, lambda t: t.color):
        thing = rng.choice(named)
        return _short("shape", f"What shape is the {thing.color} object?", thing.shape)
    return None


def _count(rng: random.Random, scene: Scene) -> Question:
    """Of all objects, of a colour or of a shape; one in four of the latter is drawn blindly."""
    what = rng.randrange(3)
    thing = rng.choice(scene.things)
    if what == 0:
        return _number("How many objects are there?", len(scene.things))
    if what == 1:
        color = thing.color if rng.random() < 0.75 else rng.choice(list(COLORS))
        count = sum(t.color == color for t in scene.things)
        return _number(f"How many {color} objects are there?", count)
    shape = thing.shape if rng.random() < 0.75 else rng.choice(SHAPES)
    count = sum(t.shape == shape for t in scene.things)
    return _number(f"How many {plural(shape)} are there?", count)


def _exists(rng: random.Random, scene: Scene) -> Question:
    """Half of the time colour or shape is replaced, so that one of them alone can't tell."""
    thing = rng.choice(scene.things)
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            color = rng.choice([c for c in COLORS if c != color])
        else:
            shape = rng.choice([s for s in (*SHAPES, CARD) if s != shape])
    found = any((t.color, t.shape) == (color, shape) for t in scene.things)
    return _short("exists", f"Is there {article(color)} {shape}?", "yes" if found else "no")


def _where(rng: random.Random, scene: Scene) -> Question | None:
    if named := _unique(scene.things, lambda t: (t.color, t.shape)):
        thing = rng.choice(named)
        return _short("where", f"Where is the {thing.color} {thing.shape}?", thing.position)
    return None


def _digit(rng: random.Random, scene: Scene) -> Question | None:
    cards = [thing for thing in scene.things if thing.shape == CARD]
    if len(cards) == 1 and rng.random() < 0.5:
        return _short("digit", "What number is on the card?", str(cards[0].digit))
    if named := _unique(cards, lambda t: t.color):
        thing = rng.choice(named)
        return _short("digit", f"What number is on the {thing.color} card?", str(thing.digit))
    return None


def _choice(rng: random.Random, scene: Scene) -> Question | None:
    """A short question (colour, shape or number) with four options, one of them right."""
    short, options = rng.choice(
        ((_color, tuple(COLORS)), (_shape, (*SHAPES, CARD)), (_count, NUMBERS))
    )
    question = short(rng, scene)
    if question is None:
        return None
    right = question.answers[0]
    shown = [*rng.sample([option for option in options if option != right], 3), right]
    rng.shuffle(shown)
    return choose(question.text, tuple(shown), right)


def choose(text: str, options: tuple[str, ...], right: str) -> Question:
    """A multiple-choice question: `text` and the lettered options."""
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    letter = LETTERS[options.index(right)]
    answers = (letter, lettered[options.index(right)])
    return Question(f"{text} {' '.join(lettered)} Answer with the letter.", answers, "choice")


def _caption(_: random.Random, scene: Scene) -> Question:
    return _short("caption", "Describe the image.", describe(scene))


def _open(rng: random.Random, scene: Scene) -> Question | None:
    """What is in a cell, or in the cell beside a named object; one answer in ten is `nothing`."""
    empty = rng.random() < 0.1
    if rng.random() < 0.6:
        cells = [c for c in range(GRID * GRID) if (scene.at(*divmod(c, GRID)) is None) == empty]
        cell = rng.choice(cells)
        return _phrase(f"What is at the {POSITIONS[cell]}?", scene.at(*divmod(cell, GRID)))
    pairs = [
        (thing, word, there)
        for thing in _unique(scene.things, lambda t: (t.color, t.shape))
        for word, (down, right) in BESIDE.items()
        if 0 <= thing.row + down < GRID and 0 <= thing.column + right < GRID
        if ((there := scene.at(thing.row + down, thing.column + right)) is None) == empty
    ]
    if not pairs:
        return None
    thing, word, there = rng.choice(pairs)
    return _phrase(f"What is {word} the {thing.color} {thing.shape}?", there)


def _short(kind: str, text: str, answer: str) -> Question:
    return Question(text, (answer,), kind)


def _number(text: str, count: int) -> Question:
    return Question(text, (NUMBERS[count], str(count)), "count")


def _phrase(text: str, thing: Thing | None) -> Question:
    if thing is None:
        return Question(text, ("nothing",), "open")
    return Question(text, (article(name(thing)), name(thing)), "open")


ASK: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "digit": _digit,
    "choice": _choice,
    "caption": _caption,
    "open": _open,
}


def ask(
    rng: random.Random, scene: Scene, count: int, weights: dict[str, float] | None = None
) -> list[Question]:
    """Up to `count` different questions about a scene.

    Kinds are drawn by `weights` (equal without); a scene may offer fewer questions than asked for.
    """
    kinds = list(weights) if weights else list(KINDS)
    shares = list(weights.values()) if weights else None
    found: dict[str, Question] = {}
    for _ in range(4 * count):
        question = ASK[rng.choices(kinds, shares)[0]](rng, scene)
        if question and question.text not in found:
            found[question.text] = question
            if len(found) == count:
                break
    return list(found.values())
