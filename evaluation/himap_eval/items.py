# SPDX-License-Identifier: Apache-2.0
"""Questions about images, from a JSONL file or from the project's held-out set."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .scoring import METRICS


class DataError(ValueError):
    """Data that can't be used. The message says where and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        image: a data URL, or a file.
        question: its text, as sent.
        answers: accepted answers.
        kind: accuracy is reported per kind.
        group: the bootstrap draws whole groups, for example the items that share an image.
        metric: a name in `scoring.METRICS`.
    """

    image: str | Path
    question: str
    answers: tuple[str, ...]
    kind: str
    group: str
    metric: str = "exact"

    def image_url(self) -> str:
        """The image as a data URL, read only now: a data set may be larger than memory."""
        if isinstance(self.image, str):
            return self.image
        mime = mimetypes.guess_type(self.image.name)[0] or "image/jpeg"
        return f"data:{mime};base64,{base64.b64encode(self.image.read_bytes()).decode()}"


def read_jsonl(path: Path, images: Path | None) -> Iterator[Item]:
    """Items of a JSONL file.

    A line has `image` (data URL, or a path relative to `images` or to the file), `question`,
    `answers` (a list, or one string), and may have `kind`, `group` (default: the image) and
    `metric`.

    Raises:
        DataError: a line is wrong.
    """
    folder = images or path.parent
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield _item(json.loads(line), folder)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise DataError(f"{path}:{number}: {what}") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _item(raw: dict[str, Any], folder: Path) -> Item:
    answers = raw["answers"]
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers must be a string, or a list of at least one string")
    metric = raw.get("metric", "exact")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    name = raw["image"]
    return Item(
        image=name if name.startswith("data:") else folder / name,
        question=str(raw["question"]),
        answers=answers,
        kind=str(raw.get("kind", "all")),
        group=str(raw.get("group", name)),
        metric=metric,
    )


def held_out(num_scenes: int, first: int = 0) -> tuple[list[Item], dict[str, Image]]:
    """Questions about `num_scenes` scenes of the held-out set from number `first` on.

    No training has seen these scenes. Each has two questions.

    Returns:
        The questions, and the pictures by scene number.

    Raises:
        DataError: `himap_demo` is not installed.
    """
    try:
        from himap_demo import heldout
    except ImportError as error:
        raise DataError(f"the held-out set can't be loaded ({error}); name a data file") from error
    items: list[Item] = []
    pictures: dict[str, Image] = {}
    url = ""
    for item in heldout.items(num_scenes, first=first):
        scene = str(item.scene)
        if scene not in pictures:
            pictures[scene] = item.image
            buffer = io.BytesIO()
            item.image.save(buffer, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        items.append(Item(url, item.question, tuple(item.answers), item.kind, scene))
    return items, pictures


def sample(items: Sequence[Item], limit: int | None, seed: int = 0) -> list[Item]:
    """At most `limit` items in their order, drawn by whole groups; the last may be incomplete."""
    if limit is None or len(items) <= limit:
        return list(items)
    groups = list(dict.fromkeys(item.group for item in items))
    random.Random(seed).shuffle(groups)
    place = {group: index for index, group in enumerate(groups)}
    first = sorted(range(len(items)), key=lambda index: place[items[index].group])[:limit]
    return [items[index] for index in sorted(first)]


def check_images(items: Sequence[Item]) -> None:
    """Raise a DataError for the first image file that does not exist."""
    for item in items:
        if isinstance(item.image, Path) and not item.image.is_file():
            raise DataError(f"{item.image} is missing; --images names the folder of the images")
