# SPDX-License-Identifier: Apache-2.0
"""The pixels of an image as a browser shows them, on a background; the only place that decodes.

The first frame of an animation, upright by its Exif data. Color profiles and gamma are not applied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from .security.containers import num_scans
from .security.images import open_image

UNDECODABLE = "an image can't be decoded"
"""The only text of `decode_image`'s errors; a decoder's own can tell of its memory."""

WHITE = (255, 255, 255)

_PNG_DEPTH = 24  # the place of the bit depth in a PNG's first chunk


class Room:
    """Lets images be decoded beside each other as long as they have few pixels together.

    One image is decoded whatever it has. A pixel takes up to 16 bytes meanwhile.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._pixels = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait for room, in a thread, and hold it."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pixels or self._pixels + pixels <= self._max_pixels
            )
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


def decode_image(
    data: bytes,
    background: tuple[int, int, int] = WHITE,
    factor: int = 1,
    room: Room | None = None,
) -> Image.Image:
    """The image's pixels in mode RGB.

    Args:
        data: of an image that `check_image` has let through.
        background: what transparent pixels show.
        factor: 1, 2, 4 or 8, which divides width and height: the image is scaled down by it.
        room: shared by images that are decoded at the same time.

    Raises:
        ValueError: the pixels are damaged; its text is `UNDECODABLE`.
    """
    try:
        with open_image(data) as image:
            width, pixels = image.width, image.width * image.height
            if factor > 1:  # a JPEG's decoder can do it
                image.draft(None, (width // factor, image.height // factor))
            factor = factor * image.width // width
            # With several scans the decoder holds coefficients of all pixels. One more may be of a
            # thumbnail.
            if not image.info.get("progressive") and num_scans(data) <= 2:
                pixels = image.width * image.height
            with room.take(pixels) if room is not None else nullcontext():
                shown = _decode(image, data, background)
                return shown.reduce(factor) if factor > 1 else shown
    except Exception:  # decoders raise all kinds of exceptions
        raise ValueError(UNDECODABLE) from None


def _decode(image: ImageFile, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    frame = image.tile[0][1] if image.format == "GIF" else None
    with suppress(Exception):  # Exif data can be wrong in every way
        ImageOps.exif_transpose(image, in_place=True)
    image.load()
    depth = data[_PNG_DEPTH] if image.format == "PNG" else 8
    return _on_background(_eight_bits(image, depth), background, frame)


def _eight_bits(image: Image.Image, depth: int) -> Image.Image:
    """The image with 8 bits a sample, the color that a PNG makes transparent, too.

    Pillow gives a gray image of 16 bits as such, and clips what is brighter than 255 to white. It
    reads other samples with `depth` bits into 8, and leaves the transparent color as it was.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        gray = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            gray.putalpha(Image.fromarray((values != clear).astype(np.uint8) * 255))
        return gray
    if image.mode in ("1", "L") and clear is not None:
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif image.mode == "RGB" and clear is not None:
        image.info["transparency"] = tuple(value >> (depth - 8) for value in clear)
    return image


def _on_background(
    image: Image.Image,
    background: tuple[int, int, int],
    frame: tuple[int, int, int, int] | None,
) -> Image.Image:
    """The image in RGB. `frame` is the part that has pixels; the rest is transparent."""
    shown = image
    if image.has_transparency_data:
        shown = image.convert("RGBA") if image.mode != "RGBA" else image
    elif image.mode != "RGB":
        shown = image.convert("RGB")
    whole = (0, 0, *image.size)
    if frame is None:
        frame = whole
    if shown.mode == "RGB" and frame == whole:
        return shown
    canvas = Image.new("RGB", image.size, background)
    part = shown if frame == whole else shown.crop(frame)
    canvas.paste(part, frame[:2], part if part.mode == "RGBA" else None)
    return canvas
