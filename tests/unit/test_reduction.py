# SPDX-License-Identifier: Apache-2.0
"""Large images are scaled down before the processor, which then sees nearly the same."""

from __future__ import annotations

import threading
import time
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import transformers as hf
from himap_server.decoding import Room, decode_image
from himap_server.reduction import Reduction, reduction_for
from PIL import Image, ImageFilter

from tests.unit.image_files import LIMITS, encode

CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SQUARE = {"size": {"height": 384, "width": 384}}


def qwen(pixels: int) -> Any:
    return hf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=pixels)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (hf.CLIPImageProcessor(**CLIP), Reduction(side=336)),
        (hf.SiglipImageProcessor(**SQUARE), Reduction(side=384)),
        (hf.LlavaImageProcessor(**CLIP), Reduction(side=336)),
        (qwen(1280 * 28 * 28), Reduction(pixels=1280 * 28 * 28)),
        (hf.CLIPImageProcessor(**CLIP, do_resize=False), Reduction()),
        # By tiles, or to a size that follows the image's own.
        (hf.LlavaNextImageProcessor(**CLIP), Reduction()),
        (hf.LlavaOnevisionImageProcessor(**SQUARE), Reduction()),
        (hf.PixtralImageProcessor(), Reduction()),
        (hf.GotOcr2ImageProcessor(), Reduction()),
        (hf.Idefics3ImageProcessor(), Reduction()),
        (object(), Reduction()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_known_of_processors(processor: Any, expected: Reduction) -> None:
    assert reduction_for(processor) == expected


@pytest.mark.parametrize(
    ("reduction", "size", "factor"),
    [
        (Reduction(side=336), (4032, 3024), 4),
        (Reduction(side=336), (3024, 4032), 4),
        (Reduction(side=336), (8064, 6048), 8),
        (Reduction(side=336), (1344, 1344), 2),
        (Reduction(side=336), (1342, 1344), 1),  # an image of 671 pixels would be left
        (Reduction(side=336), (4033, 3024), 1),  # odd
        (Reduction(side=336), (4034, 3022), 2),  # twice an odd number
        (Reduction(side=336), (40320, 672), 1),  # its short side decides
        (Reduction(pixels=10**6), (4000, 4000), 2),
        (Reduction(pixels=10**6), (3998, 4000), 1),
        (Reduction(pixels=12845056), (4032, 3024), 1),
        (Reduction(), (16000, 16000), 1),
    ],
)
def test_factor(reduction: Reduction, size: tuple[int, int], factor: int) -> None:
    assert reduction.factor(*size) == factor


@cache
def photo(width: int, height: int, kind: str) -> bytes:
    """Edges and noise of every size."""
    chance = np.random.default_rng(3)
    whole = np.zeros((height, width, 3), np.uint16)
    for side in (4, 16, 64, 256):
        noise = chance.integers(0, 256, (height // side + 1, width // side + 1, 3), np.uint16)
        whole += noise.repeat(side, 0).repeat(side, 1)[:height, :width]
    image = Image.fromarray((whole // 4).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    buffer = BytesIO()
    image.save(buffer, kind, quality=92, compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (hf.CLIPImageProcessor(**CLIP), (1792, 1536)),
        (hf.CLIPImageProcessor(**CLIP), (1440, 1800)),
        (hf.SiglipImageProcessor(**SQUARE), (1792, 1536)),
        (qwen(144 * 28 * 28), (1792, 1536)),
        (qwen(64 * 28 * 28), (700, 1500)),
    ],
)
def test_a_processor_sees_nearly_the_same(processor: Any, size: tuple[int, int], kind: str) -> None:
    data = photo(*size, kind)
    factor = reduction_for(processor).factor(*size)
    assert factor > 1
    whole = decode_image(data)
    small = decode_image(data, factor=factor)
    assert small.size == (size[0] // factor, size[1] // factor)
    seen = [processor(image, return_tensors="np") for image in (whole, small)]
    if "image_grid_thw" in seen[0]:
        assert (seen[0]["image_grid_thw"] == seen[1]["image_grid_thw"]).all()
    values = [np.asarray(each["pixel_values"]) for each in seen]
    assert values[0].shape == values[1].shape
    assert np.abs(values[0] - values[1]).mean() < 0.015  # one of 256 steps of a color


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_every_format_is_scaled_down(kind: str, factor: int) -> None:
    columns = np.zeros((64, 96, 3), np.uint8)
    columns[:, 48:] = (200, 100, 50)
    buffer = BytesIO()
    Image.fromarray(columns).save(buffer, kind, quality=100, lossless=True, subsampling=0)
    ours = np.asarray(decode_image(buffer.getvalue(), factor=factor)).astype(int)
    assert ours.shape == (64 // factor, 96 // factor, 3)
    assert np.abs(ours[:, : 48 // factor]).max() <= 4
    assert np.abs(ours[:, 48 // factor :] - (200, 100, 50)).max() <= 4


def test_an_image_is_turned_after_it_is_scaled_down() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode("JPEG", (64, 32), exif=exif)
    assert decode_image(data, factor=2).size == (16, 32)


def test_room() -> None:
    """Images beside each other have at most so many pixels, or are alone."""
    room = Room(100)
    held: list[int] = []
    most: list[int] = []

    def decode(pixels: int) -> None:
        with room.take(pixels):
            held.append(pixels)
            most.append(sum(held))
            time.sleep(0.005)
            held.remove(pixels)

    sizes = [40, 40, 40, 100, 10, 90, 250, 1] * 4
    threads = [threading.Thread(target=decode, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == len(sizes)
    assert all(pixels <= 100 or pixels == 250 for pixels in most)
    assert max(pixels for pixels in most if pixels != 250) > 40  # some were beside each other


def test_the_room_is_free_after_a_damaged_image() -> None:
    room = Room(LIMITS.max_pixels)
    for _ in range(2):
        with pytest.raises(ValueError, match="decoded"):
            decode_image(encode("PNG", (64, 64))[:2000], room=room)
    with room.take(10**9):  # it would wait for ever
        pass


@pytest.mark.parametrize(("progressive", "pixels"), [(False, 8 * 8), (True, 64 * 64)])
def test_a_progressive_image_takes_room_for_its_whole_size(progressive: bool, pixels: int) -> None:
    """Its decoder holds coefficients of all pixels, however far it scales them down."""
    taken: list[int] = []

    class Watched(Room):
        def take(self, pixels: int) -> Any:
            taken.append(pixels)
            return super().take(pixels)

    data = encode("JPEG", (64, 64), progressive=progressive)
    assert decode_image(data, factor=8, room=Watched(10**6)).size == (8, 8)
    assert taken == [pixels]
