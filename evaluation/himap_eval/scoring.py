# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, in [0, 1], by the rule of each data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .boxes import overlap, parse_box

_SPACE = re.compile(r"\s+")
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!:]|[.,](?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}


def normalized(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return _SPACE.sub(" ", text).strip().rstrip(".").rstrip().lower()


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 if the normalised answer is one of the accepted answers."""
    return float(normalized(answer) in {normalized(right) for right in accepted})


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """POPE, MME: the first yes or no of the answer decides. Without either, the answer is wrong."""
    found = re.search(r"\b(yes|no)\b", answer.lower())
    return float(found is not None and found[0] in {normalized(right) for right in accepted})


def choice(answer: str, accepted: Sequence[str]) -> float:
    """ScienceQA: the option's letter, alone, before its text, or in "The answer is X"."""
    text = answer.strip()
    found = re.match(r"\(?([A-Z])\)?(?:$|[.:)\s])", text) or re.search(
        r"answer is:? \(?([A-Z])\b", text
    )
    return float(found is not None and found[1] in accepted)


def vqa(answer: str, accepted: Sequence[str]) -> float:
    """TextVQA: min(1, matches / 3), averaged over leaving out each annotator.

    VQA (https://arxiv.org/abs/1505.00468), section 2.2; normalised as its evaluator does, except
    for the list of contractions.
    """
    text = _vqa_normalized(answer)
    matches = [_vqa_normalized(right) == text for right in accepted]
    if len(matches) == 1:
        return float(matches[0])
    others = (sum(matches) - own for own in matches)
    return sum(min(1.0, count / 3) for count in others) / len(matches)


def _vqa_normalized(text: str) -> str:
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, accepted: Sequence[str]) -> float:
    """DocVQA: 1 - edit distance / length of the longer text, of the most similar answer.

    Below 0.5 it is 0 (average normalised Levenshtein similarity,
    https://arxiv.org/abs/1905.13648).
    """
    texts = [" ".join(text.lower().split()) for text in (answer, *accepted)]
    best = max(
        1 - _edit_distance(texts[0], right) / max(len(texts[0]), len(right), 1)
        for right in texts[1:]
    )
    return best if best >= 0.5 else 0.0


def _edit_distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for done, letter in enumerate(one, start=1):
        above, row[0] = row[0], done
        for index, wanted in enumerate(other, start=1):
            cost = min(row[index] + 1, row[index - 1] + 1, above + (letter != wanted))
            above, row[index] = row[index], cost
    return row[-1]


def contains(answer: str, accepted: Sequence[str]) -> float:
    """OCRBench: 1 if an accepted answer is part of the answer, ignoring case."""
    text = answer.lower().replace("\n", " ")
    return float(any(right.lower().strip().replace("\n", " ") in text for right in accepted))


def contains_formula(answer: str, accepted: Sequence[str]) -> float:
    """OCRBench's HME100k: the same with case, and without spaces."""
    text = "".join(answer.split())
    return float(any("".join(right.split()) in text for right in accepted))


def iou(answer: str, accepted: Sequence[str]) -> float:
    """RefCOCO: 1 if the first box of the answer covers the right one with an IoU of 0.5 or more."""
    box = parse_box(answer)
    boxes = [right for right in map(parse_box, accepted) if right is not None]
    return float(box is not None and any(overlap(box, right) >= 0.5 for right in boxes))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "yes_no": yes_no,
    "choice": choice,
    "vqa": vqa,
    "anls": anls,
    "contains": contains,
    "contains_formula": contains_formula,
    "iou": iou,
}
