# SPDX-License-Identifier: Apache-2.0
"""Training examples: a picture, labels of its patches, and as many questions as fit a fixed length.

An example is a function of its index. Nothing is stored: drawing and asking take 3 ms.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from himap_demo.heldout import training_seed
from himap_demo.questions import LETTERS, NUMBERS, Question, ask, choose
from himap_demo.scenes import CARD, CARDS, CELL, COLORS, SHAPES, WORDS, Scene, draw, make_scene
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from .model import CHARACTERS, IMAGE_TOKENS, LABELS, PATCH, SIDE
from .tokenizer import AFTER_QUESTION, BEFORE_IMAGE, BOS, IMAGE

LENGTH = 576
"""Tokens of an example: the image and some 13 questions."""
WEIGHTS = {
    **{"color": 0.5, "shape": 0.5, "count": 8.0, "exists": 1.0, "where": 1.0, "number": 3.0},
    **{"word": 1.0, "relation": 2.0, "choice": 4.0, "caption": 10.0, "open": 5.0},
}
"""How often each kind is asked: more of what is learnt late."""
LAYOUTS = {"large": 0.5, "small": 0.35, "mixed": 0.15}
"""Of pictures with questions: more of those that can be described."""
LOSS = {"caption": 2.0, "count": 1.5}
"""Loss weight of the answers of a kind, if not 1."""
FOLLOW_UP = 0.4
"""Share of the questions that are asked in the conversation of the one before."""

OPTION = 0.2
"""Loss weight of the letters B, C and D before their options. To predict them, each option must
encode its own letter, which multiple choice needs first."""

TOWER_CARDS = 0.8
"""Share of cards among the objects of pictures without questions: text is learnt late."""

_WORDS = (tuple(COLORS), (*SHAPES, CARD), NUMBERS, WORDS)
_HUES = list(COLORS)
_FORMS = [*SHAPES, CARD]


def pixel_values(image: Image.Image) -> Tensor:
    """[3, SIZE, SIZE] in -1 to 1, as the exported image processor makes it."""
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)


def patch_labels(scene: Scene) -> Tensor:
    """[len(LABELS), patches]: the object whose box a patch touches, its text, the patch's cell."""
    labels = np.zeros((len(LABELS), SIDE, SIDE), np.int64)
    per_cell = CELL // PATCH
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] // per_cell
    labels[-1] = rows * (SIDE // per_cell) + columns
    for thing in scene.things:
        left, top, right, bottom = (int(edge // PATCH) for edge in thing.box)
        box = (slice(max(top, 0), bottom + 1), slice(max(left, 0), right + 1))
        text = [1 + CHARACTERS.index(character) for character in thing.text]
        shown = (1 + _HUES.index(thing.color), 1 + _FORMS.index(thing.shape), *text)
        labels[(slice(len(shown)), *box)] = np.array(shown)[:, None, None]
    return torch.from_numpy(labels.reshape(len(LABELS), -1))


def match(rng: random.Random) -> Question:
    """Multiple choice that needs no image: it teaches how to find the letter of an option."""
    options = tuple(rng.sample(rng.choice(_WORDS), rng.randint(2, 4)))
    right = rng.choice(options)
    return choose(f"What is the letter of {right}?", options, right)


def drill(rng: random.Random) -> Question:
    """Lettered options, then each option with its letter, twice in random order.

    The loss covers the letters only: a drill of looking up what was read.
    """
    options = rng.sample(rng.choice(_WORDS), 4)
    lettered = list(zip(LETTERS, options, strict=True))
    text = " ".join(f"{letter}. {option}" for letter, option in lettered)
    again = [*rng.sample(lettered, 4), *rng.sample(lettered, 4)]
    answer = " ".join(f"{option} {letter}" for letter, option in again)
    return Question(
        f"What is the letter? {text} Answer with the object and the letter.", (answer,), "drill"
    )


def spell_out(question: Question) -> Question:
    """A multiple-choice question answered by the option and then its letter.

    The model learns to go from a word that it just said to the letter thousands of steps earlier
    than from the question to the letter; the second skill builds on the first.
    """
    letter, option = question.answers[1].split(". ")
    # In words that the tokenizer knows whole.
    text = question.text.replace("with the letter.", "with the object and the letter.")
    return Question(text, (f"{option} {letter}",), question.kind)


class Examples(Dataset[dict[str, Tensor]]):
    """Example `index` of training, as tensors.

    pixels [3, SIZE, SIZE], labels [len(LABELS), patches]; with questions also tokens, positions,
    segments, weights and voters [LENGTH]. Weights are those of the loss: 0 but at the tokens of
    answers. Voters are the tokens of questions.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, first: int, count: int, questions: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.first = first
        self.count = count
        self.questions = questions
        image = BOS + BEFORE_IMAGE + IMAGE * IMAGE_TOKENS
        self.letters = [tokenizer(f" {letter}")["input_ids"][0] for letter in LETTERS]
        self.prefix: list[int] = tokenizer(image)["input_ids"]
        self.newline: list[int] = tokenizer("\n")["input_ids"]
        self.again: list[int] = tokenizer(BEFORE_IMAGE)["input_ids"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seed = training_seed(self.first + index)
        shares = (CARDS, LAYOUTS) if self.questions else (TOWER_CARDS, None)
        scene = make_scene(seed, *shares)
        example = {"pixels": pixel_values(draw(scene)), "labels": patch_labels(scene)}
        return example | self._text(scene) if self.questions else example

    def _text(self, scene: Scene) -> dict[str, Tensor]:
        # Apart from the scene's own stream, so that questions can change and pictures stay.
        rng = random.Random(f"questions {scene.seed}")
        questions = [*ask(rng, scene, 16, WEIGHTS), match(rng)]
        rng.shuffle(questions)
        questions = [
            spell_out(question) if question.kind == "choice" and rng.random() < 0.25 else question
            for question in questions
        ]
        questions.insert(0, drill(rng) if rng.random() < 0.5 else match(rng))
        tokens = list(self.prefix)
        positions = list(range(len(tokens)))
        segments = [0] * len(tokens)
        weights = [0.0] * len(tokens)
        voters = [False] * len(tokens)
        segment = 0
        for question in questions:
            asked = self.tokenizer(question.text + AFTER_QUESTION)["input_ids"]
            answer = self.tokenizer(" " + question.answers[0])["input_ids"]
            answer = [*answer, self.tokenizer.eos_token_id]
            follows = segment > 0 and rng.random() < FOLLOW_UP
            before = self.again if follows else self.newline
            added = before + asked + answer
            if len(tokens) + len(added) > LENGTH:
                continue
            segment += not follows
            begin = positions[-1] + 1 if follows else len(self.prefix)
            tokens += added
            positions += range(begin, begin + len(added))
            segments += [segment] * len(added)
            voters += [True] * (len(added) - len(answer)) + [False] * len(answer)
            # A caption has ten times the tokens of a short answer and shall not weigh ten times it.
            weights += [0.0] * len(before)
            weights += [OPTION if token in self.letters[1:] else 0.0 for token in asked]
            if question.kind == "drill":
                weights += [1.0 if token in self.letters else 0.0 for token in answer]
            else:
                weights += [LOSS.get(question.kind, 1.0) * len(answer) ** -0.5] * len(answer)
        padding = LENGTH - len(tokens)
        return {
            "tokens": torch.tensor(tokens + [self.tokenizer.pad_token_id] * padding),
            "positions": torch.tensor(positions + [0] * padding),
            "segments": torch.tensor(segments + [-1] * padding),
            "weights": torch.tensor(weights + [0.0] * padding),
            "voters": torch.tensor(voters + [False] * padding),
        }


def batches(
    tokenizer: PreTrainedTokenizerFast, first: int, steps: int, size: int, questions: bool
) -> Iterator[dict[str, Tensor]]:
    """`steps` batches of `size` examples, from example `first` on, made in a process of their own.

    Without questions: pictures and labels alone.
    """
    examples = Examples(tokenizer, first, steps * size, questions)
    return iter(DataLoader(examples, size, num_workers=1, prefetch_factor=8))
