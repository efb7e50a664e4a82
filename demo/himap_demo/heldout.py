# SPDX-License-Identifier: Apache-2.0
"""The questions that measure the model, about scenes that training never draws.

Every scene has a seed. Training uses seeds below `FIRST_SEED`, the held-out set those from it on.
So the two sets share no picture. Attributes of objects and words of questions do recur, on purpose.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from .questions import KINDS, ask
from .scenes import draw, make_scene

FIRST_SEED = 1 << 40


@dataclass(frozen=True)
class Item:
    """One question. Those with one `scene` share a picture; a bootstrap draws them together.

    `tag` says how large the object is that the question is about, "" if it is about several.
    """

    image: Image.Image
    question: str
    answers: tuple[str, ...]
    kind: str
    scene: int
    tag: str


def training_seed(index: int) -> int:
    """The seed of a training scene. Raises a ValueError if it would be a held-out scene."""
    if not 0 <= index < FIRST_SEED:
        raise ValueError(f"training scenes are numbered 0 to {FIRST_SEED - 1}, not {index}")
    return index


def items(num_scenes: int, questions_per_scene: int = 2, first: int = 0) -> Iterator[Item]:
    """The questions about `num_scenes` held-out scenes from number `first` on, always the same.

    Kinds take turns, so that each has about the same number of questions. If a scene allows no
    question of a kind (it has no card, for example), it gets one of the next possible kind.
    """
    turn = 0
    for seed in range(FIRST_SEED + first, FIRST_SEED + first + num_scenes):
        scene = make_scene(seed)
        rng = random.Random(seed)
        image = draw(scene)
        asked: set[str] = set()
        for _ in range(questions_per_scene):
            for kind in (KINDS[(turn + i) % len(KINDS)] for i in range(len(KINDS))):
                found = [q for q in ask(rng, scene, 1, {kind: 1.0}) if q.text not in asked]
                if found:
                    break
            turn += 1
            for question in found:
                asked.add(question.text)
                tag = ""
                if question.thing is not None:
                    tag = "small objects" if question.thing.small else "large objects"
                yield Item(image, question.text, question.answers, question.kind, seed, tag)
