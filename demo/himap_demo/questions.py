# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, each with the answers that are accepted.

Four groups, those of the HiMAP paper's data sets: short answers (`color`, `shape`, `count`,
`exists`, `where`, `number`, `word`, `relation`), multiple choice (`choice`, answered by the
letter), captions (`caption`) and open questions answered by a phrase (`open`). A question is asked
only where it has one answer: "What color is the star?" needs a scene with exactly one star.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .scenes import CARD, CELL, COLORS, GRID, POSITIONS, SHAPES, WORDS, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
LETTERS = "ABCD"
MOST_NAMED = 6
"""Objects of a scene that is described."""
BESIDE = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
"""Directions: rows and columns from the object named to the one asked for."""
APART = 0.4 * CELL
"""Least distance, along its direction, of two objects whose relation is asked for."""

GROUPS = {
    "short answer": (
        *("color", "shape", "count", "exists", "where"),
        *("number", "word", "relation"),
    ),
    "multiple choice": ("choice",),
    "captions": ("caption",),
    "open questions": ("open",),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)


@dataclass(frozen=True)
class Question:
    """`answers[0]` is what the model is taught to say; the others mean the same.

    `thing` is the object that the question is about, if it is one.
    """

    text: str
    answers: tuple[str, ...]
    kind: str
    thing: Thing | None = None


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name(thing: Thing) -> str:
    """`red star`, `blue card with 407`."""
    return f"{thing.color} {thing.shape}{f' with {thing.text}' if thing.text else ''}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def describe(scene: Scene) -> str:
    """Every object in the order of the cells."""
    names = [article(name(thing)) for thing in scene.things]
    return (", ".join(names[:-1]) + " and " if names[:-1] else "") + names[-1]


def _unique(things: Iterable[Thing], key: Callable[[Thing], object]) -> list[Thing]:
    """The objects that share `key` with no other."""
    things = list(things)
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def _named(scene: Scene) -> list[Thing]:
    """The objects that colour and shape name."""
    return _unique(scene.things, lambda t: (t.color, t.shape))


def _one_shape(scene: Scene) -> list[Thing]:
    """The objects that their shape alone names. Cards are asked for by their text instead."""
    return [thing for thing in _unique(scene.things, lambda t: t.shape) if thing.shape != CARD]


def _alone(scene: Scene) -> list[Thing]:
    """The objects that share their cell with no other."""
    return _unique(scene.things, lambda t: t.position)


def _color(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.3 and (alone := _alone(scene)):
        thing = rng.choice(alone)
        return _about("color", f"What color is the object at the {thing.position}?", thing)
    if named := _one_shape(scene):
        thing = rng.choice(named)
        return _about("color", f"What color is the {thing.shape}?", thing)
    return None


def _shape(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.3 and (alone := _alone(scene)):
        thing = rng.choice(alone)
        return _about("shape", f"What shape is the object at the {thing.position}?", thing)
    if named := _unique(scene.things, lambda t: t.color):
        thing = rng.choice(named)
        return _about("shape", f"What shape is the {thing.color} object?", thing)
    return None


def _count(rng: random.Random, scene: Scene) -> Question | None:
    """Of all objects, of a colour or of a shape; one in four of the latter is drawn blindly."""
    what = rng.randrange(3)
    thing = rng.choice(scene.things)
    if what == 0:
        text, count = "How many objects are there?", len(scene.things)
    elif what == 1:
        color = thing.color if rng.random() < 0.75 else rng.choice(list(COLORS))
        count = sum(t.color == color for t in scene.things)
        text = f"How many {color} objects are there?"
    else:
        shape = thing.shape if rng.random() < 0.75 else rng.choice(SHAPES)
        count = sum(t.shape == shape for t in scene.things)
        text = f"How many {plural(shape)} are there?"
    if count >= len(NUMBERS):
        return None
    return Question(text, (NUMBERS[count], str(count)), "count")


def _exists(rng: random.Random, scene: Scene) -> Question:
    """Half of the time colour or shape is replaced, so that one of them alone can't tell."""
    thing = rng.choice(scene.things)
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            color = rng.choice([c for c in COLORS if c != color])
        else:
            shape = rng.choice([s for s in (*SHAPES, CARD) if s != shape])
    found = [t for t in scene.things if (t.color, t.shape) == (color, shape)]
    text = f"Is there {article(color)} {shape}?"
    return Question(text, ("yes" if found else "no",), "exists", found[0] if found else None)


def _where(rng: random.Random, scene: Scene) -> Question | None:
    if named := _named(scene):
        thing = rng.choice(named)
        return _about("where", f"Where is the {thing.color} {thing.shape}?", thing)
    return None


def _number(rng: random.Random, scene: Scene) -> Question | None:
    return _read(rng, scene, "number", str.isdigit)


def _word(rng: random.Random, scene: Scene) -> Question | None:
    return _read(rng, scene, "word", str.isalpha)


def _read(
    rng: random.Random, scene: Scene, kind: str, says: Callable[[str], bool]
) -> Question | None:
    """What a card says. Among all cards, if its colour names it."""
    cards = [thing for thing in scene.things if says(thing.text)]
    if len(cards) == 1 and rng.random() < 0.4:
        return _about(kind, f"What {kind} is on the card?", cards[0])
    if named := _unique(cards, lambda t: t.color):
        thing = rng.choice(named)
        return _about(kind, f"What {kind} is on the {thing.color} card?", thing)
    return None


def _relation(rng: random.Random, scene: Scene) -> Question | None:
    """Which side of an object another one is on, yes or no."""
    named = _named(scene)
    if len(named) < 2:
        return None
    one, other = rng.sample(named, 2)
    word, (down, right) = rng.choice(list(BESIDE.items()))
    distance = down * (one.y - other.y) + right * (one.x - other.x)
    if abs(distance) < APART:
        return None
    text = f"Is the {one.color} {one.shape} {word} the {other.color} {other.shape}?"
    return Question(text, ("yes" if distance > 0 else "no",), "relation", one)


def _choice(rng: random.Random, scene: Scene) -> Question | None:
    """A short question with four options, one of them right."""
    short, options = rng.choice(
        (
            (_color, tuple(COLORS)),
            (_shape, (*SHAPES, CARD)),
            (_count, NUMBERS),
            (_word, WORDS),
        )
    )
    question = short(rng, scene)
    if question is None:
        return None
    right = question.answers[0]
    shown = [*rng.sample([option for option in options if option != right], 3), right]
    rng.shuffle(shown)
    return replace(choose(question.text, tuple(shown), right), thing=question.thing)


def choose(text: str, options: tuple[str, ...], right: str) -> Question:
    """A multiple-choice question: `text` and the lettered options."""
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    letter = LETTERS[options.index(right)]
    answers = (letter, lettered[options.index(right)])
    return Question(f"{text} {' '.join(lettered)} Answer with the letter.", answers, "choice")


def _caption(_: random.Random, scene: Scene) -> Question | None:
    """Of scenes with few objects, at most one in a cell, so that their order is clear."""
    if len(scene.things) > MOST_NAMED or len(_alone(scene)) < len(scene.things):
        return None
    return Question("Describe the image.", (describe(scene),), "caption")


def _open(rng: random.Random, scene: Scene) -> Question | None:
    """What is in a cell, or in the cell beside a named object; one answer in ten is `nothing`."""
    empty = rng.random() < 0.1
    if rng.random() < 0.6:
        cells = [
            cell
            for cell in range(GRID * GRID)
            if len(scene.at(*divmod(cell, GRID))) == (0 if empty else 1)
        ]
        if not cells:
            return None
        cell = rng.choice(cells)
        return _phrase(f"What is at the {POSITIONS[cell]}?", scene.at(*divmod(cell, GRID)))
    if len(_alone(scene)) < len(scene.things):
        return None
    pairs = [
        (thing, word, there)
        for thing in _named(scene)
        for word, (down, right) in BESIDE.items()
        if 0 <= thing.row + down < GRID and 0 <= thing.column + right < GRID
        if (not (there := scene.at(thing.row + down, thing.column + right))) == empty
    ]
    if not pairs:
        return None
    thing, word, there = rng.choice(pairs)
    return _phrase(f"What is {word} the {thing.color} {thing.shape}?", there)


_ATTRIBUTES: dict[str, Callable[[Thing], str]] = {
    "color": lambda thing: thing.color,
    "shape": lambda thing: thing.shape,
    "where": lambda thing: thing.position,
    "number": lambda thing: thing.text,
    "word": lambda thing: thing.text,
}


def _about(kind: str, text: str, thing: Thing) -> Question:
    return Question(text, (_ATTRIBUTES[kind](thing),), kind, thing)


def _phrase(text: str, there: tuple[Thing, ...]) -> Question:
    if not there:
        return Question(text, ("nothing",), "open")
    (thing,) = there
    return Question(text, (article(name(thing)), name(thing)), "open", thing)


ASK: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "number": _number,
    "word": _word,
    "relation": _relation,
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
