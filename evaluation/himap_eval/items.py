# SPDX-License-Identifier: Apache-2.0
"""Questions about images, and the project's held-out set."""

from __future__ import annotations

import base64
import io
import mimetypes
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image


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
        turn: 0, or the number of questions before it in a conversation about the image. They are
            the items right before this one.
        tag: what else accuracy is reported by, across kinds: the size of the object asked for.
        together: items with the same value, other than "", are right only if all of them are.
    """

    image: str | Path
    question: str
    answers: tuple[str, ...]
    kind: str
    group: str
    metric: str = "exact"
    turn: int = 0
    tag: str = ""
    together: str = ""

    def image_url(self) -> str:
        """The image as a data URL, read only now: a data set may be larger than memory."""
        if isinstance(self.image, str):
            return self.image
        mime = mimetypes.guess_type(self.image.name)[0] or "image/jpeg"
        return f"data:{mime};base64,{base64.b64encode(self.image.read_bytes()).decode()}"


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
        items.append(Item(url, item.question, tuple(item.answers), item.kind, scene, tag=item.tag))
    return items, pictures


def in_conversations(items: Sequence[Item], turns: int) -> list[Item]:
    """The questions about each image (group) as conversations of `turns` questions, in their order.

    Questions that are left over are left out. A question's kind is then its number.

    Raises:
        DataError: no image has as many questions, the data has conversations of its own, or
            questions that count together.
    """
    if any(item.turn for item in items):
        raise DataError("the data has conversations of its own; --turns is for single questions")
    if any(item.together for item in items):
        raise DataError("the data has questions that count together; --turns would separate them")
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    found = [
        replace(item, turn=index % turns, kind=f"question {index % turns + 1}")
        for own in groups.values()
        for index, item in enumerate(own[: len(own) // turns * turns])
    ]
    if not found:
        raise DataError(f"no image has {turns} questions; use less --turns")
    return found


def conversations(items: Sequence[Item]) -> list[list[int]]:
    """The indices of the items of each conversation."""
    found: list[list[int]] = []
    for index, item in enumerate(items):
        if item.turn and found:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def sample(items: Sequence[Item], limit: int | None, seed: int = 0) -> list[Item]:
    """At most `limit` items in their order, drawn by whole groups; the last may be incomplete.

    Items that count together are drawn together.

    Raises:
        DataError: those of the first group alone are more than `limit`.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    groups = list(dict.fromkeys(item.group for item in items))
    random.Random(seed).shuffle(groups)
    place = {group: index for index, group in enumerate(groups)}
    order = sorted(range(len(items)), key=lambda index: place[items[index].group])
    cut = {items[index].together for index in order[limit:]} - {""}
    drawn = [index for index in sorted(order[:limit]) if items[index].together not in cut]
    if not drawn:
        raise DataError(f"--limit {limit} is less than the questions that count together")
    return [items[index] for index in drawn]


def check_images(items: Sequence[Item]) -> None:
    """Raise a DataError for the first image file that does not exist."""
    for item in items:
        if isinstance(item.image, Path) and not item.image.is_file():
            raise DataError(f"{item.image} is missing; --images names the folder of the images")
