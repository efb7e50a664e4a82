# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, in [0, 1], by the rule of each data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "yes_no": yes_no,
    "choice": choice,
    "vqa": vqa,
}
