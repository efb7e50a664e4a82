# SPDX-License-Identifier: Apache-2.0
"""Public data sets, read from the files that their authors publish.

The files and images are the user's; nothing is downloaded. Questions end with the instructions that
LLaVA-1.5 was trained with (https://arxiv.org/abs/2310.03744, section 3.2), MME's with their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .items import DataError, Item, read_jsonl

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."


def read_pope(path: Path, images: Path | None) -> Iterator[Item]:
    """POPE: `coco_pope_{random,popular,adversarial}.json`, one JSON object a line.

    https://arxiv.org/abs/2305.10355. `path` is one of the files or their folder; `images` has
    COCO's val2014.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        for line in file.read_text().splitlines():
            raw = json.loads(line)
            yield Item(
                image=(images or file.parent) / raw["image"],
                question=raw["text"] + _SHORT,
                answers=(raw["label"],),
                kind=file.stem.rpartition("_")[2],
                group=raw["image"],
                metric="yes_no",
            )


def read_scienceqa(path: Path, images: Path | None) -> Iterator[Item]:
    """ScienceQA-IMG: the test questions with an image, of `problems.json`.

    https://arxiv.org/abs/2209.09513. `path` is the file or its folder, which holds
    `pid_splits.json`, too; an image is `images`/test/ID/image.png, or without `test`.
    """
    folder = path if path.is_dir() else path.parent
    problems = json.loads((folder / "problems.json").read_text())
    for identifier in json.loads((folder / "pid_splits.json").read_text())["test"]:
        raw = problems[identifier]
        if not raw["image"]:
            continue
        root = images or folder
        file = root / "test" / identifier / raw["image"]
        letters = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(raw["choices"])]
        text = "\n".join([part for part in (raw["hint"], raw["question"]) if part] + letters)
        yield Item(
            image=file if file.exists() else root / identifier / raw["image"],
            question=text + _LETTER,
            answers=(chr(ord("A") + raw["answer"]),),
            kind=raw["subject"],
            group=identifier,
            metric="choice",
        )


def read_textvqa(path: Path, images: Path | None) -> Iterator[Item]:
    """TextVQA: `TextVQA_0.5.1_val.json`; `images` has `train_images`' IMAGE_ID.jpg.

    https://arxiv.org/abs/1904.08920. Without the OCR tokens that some evaluations add.
    """
    for raw in json.loads(path.read_text())["data"]:
        yield Item(
            image=(images or path.parent) / f"{raw['image_id']}.jpg",
            question=raw["question"] + _SHORT,
            answers=tuple(raw["answers"]),
            kind="textvqa",
            group=raw["image_id"],
            metric="vqa",
        )


def read_mme(path: Path, images: Path | None) -> Iterator[Item]:
    """MME: a folder per category with images and, per image, a text file of `question TAB answer`.

    https://arxiv.org/abs/2306.13394. Some categories have them in `images` and
    `questions_answers_YN`. Reported is accuracy per category, not MME's score.
    """
    if images is not None:
        raise DataError("MME's images lie beside its questions; --images is not used")
    for text in sorted(path.rglob("*.txt")):
        folder = text.parent
        category = folder.parent if folder.name == "questions_answers_YN" else folder
        places = [folder, category / "images"]
        found = [
            place / f"{text.stem}{suffix}"
            for place in places
            for suffix in (".jpg", ".png", ".jpeg")
            if (place / f"{text.stem}{suffix}").is_file()
        ]
        if not found:
            raise DataError(f"{text} has no image")
        for line in text.read_text(encoding="utf-8").splitlines():
            if line.strip():
                question, _, answer = line.rpartition("\t")
                yield Item(
                    image=found[0],
                    question=question,
                    answers=(answer.strip(),),
                    kind=category.name,
                    group=str(found[0].relative_to(path)),
                    metric="yes_no",
                )


Reader = Callable[[Path, Path | None], Iterator[Item]]
FORMATS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "pope": read_pope,
    "scienceqa": read_scienceqa,
    "textvqa": read_textvqa,
    "mme": read_mme,
}


def read(data_format: str, path: Path, images: Path | None) -> list[Item]:
    """All items of a data set.

    Raises:
        DataError: a file is missing, or not in that format.
    """
    try:
        items = list(FORMATS[data_format](path, images))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not {data_format} data: {_reason(error)}") from error
    if not items:
        raise DataError(f"{path} has no questions")
    return items


def _reason(error: Any) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
