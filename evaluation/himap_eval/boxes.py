# SPDX-License-Identifier: Apache-2.0
"""Boxes in a picture: how answers write them, and how models count their coordinates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _four(between: str) -> str:
    return between.join([r"(-?(?:\d+(?:\.\d+)?|\.\d+))"] * 4)


def _bracketed(opening: str, closing: str) -> str:
    four = _four(rf"\.?[\s,{opening}{closing}]+")
    return rf"{opening}\s*{four}\.?[\s,]*{closing}"


_SQUARE, _ROUND = _bracketed(r"\[", r"\]"), _bracketed(r"\(", r"\)")
_BOXES = (
    # `[1, 2, 3, 4]`, `[[1, 2], [3, 4]]`, `(1,2),(3,4)`, `[1. 2. 3. 4.]`, and no number before them.
    re.compile(f"{_SQUARE}|{_ROUND}"),
    # `1, 2, 3, 4`, and not the 2 of `bbox_2d`.
    re.compile(_four(r"[\s,()]+")),
)
# Qwen2.5-VL's preprocessor_config.json; sides are multiples of a patch of 14 pixels times 2.
_QWEN_PIXELS = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 12_845_056}


def parse_box(text: str) -> Box | None:
    """The first four numbers of a text in brackets, else in a row; None if there are none."""
    for kind in _BOXES:
        if found := kind.search(text):
            left, top, right, bottom = map(float, filter(None, found.groups()))
            return left, top, right, bottom
    return None


def overlap(one: Box, other: Box) -> float:
    """Intersection over union, in [0, 1]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


@dataclass(frozen=True, slots=True)
class Convention:
    """How a model counts coordinates.

    Intersection over union does not change with the scale of an axis. So the right box is converted
    to the model's coordinates, and answers are compared as they are.

    Attributes:
        question: with a place for the description.
        convert: a box in pixels of a picture, its width and its height, to the model's coordinates.
    """

    question: str
    convert: Callable[[Box, int, int], Box]


def _scaled(box: Box, x: float, y: float) -> Box:
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _pixels(box: Box, width: int, height: int) -> Box:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    tall, wide = smart_resize(height, width, **_QWEN_PIXELS)
    return _scaled(box, wide / width, tall / height)


def _square(box: Box, width: int, height: int) -> Box:
    side = max(width, height)
    x, y = (side - width) // 2, (side - height) // 2
    return _scaled((box[0] + x, box[1] + y, box[2] + x, box[3] + y), 1 / side, 1 / side)


_JSON = "Locate the object that this describes, and give its bbox coordinates in JSON format: {}"
_FRACTIONS = "Please provide the bounding box coordinate of the region this sentence describes: {}"
CONVENTIONS = {
    # Pixels of the picture as its processor resizes it: Qwen2.5-VL.
    "pixels": Convention(_JSON, _pixels),
    # Thousandths of the picture's sides: Qwen2-VL, Qwen3-VL, InternVL.
    "1000": Convention(_JSON, lambda box, width, height: _scaled(box, 1000 / width, 1000 / height)),
    # Fractions of the picture's sides.
    "unit": Convention(_FRACTIONS, lambda box, width, height: _scaled(box, 1 / width, 1 / height)),
    # Fractions of the square that the picture is padded to: LLaVA-1.5.
    "square": Convention(_FRACTIONS, _square),
}
