# SPDX-License-Identifier: Apache-2.0
"""Pixels of images in every mode that the four formats have, against what their samples say.

PNGs are written here, sample by sample, so that no code of Pillow's decides what is expected.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from himap_server.decoding import UNDECODABLE, decode_image
from himap_server.security.images import check_image
from PIL import Image, ImageCms, ImageOps

from tests.unit.image_files import LIMITS, PARAM, animation, chunk, encode

GRAY, COLOR, PALETTE, GRAY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GRAY: 1, COLOR: 3, PALETTE: 1, GRAY_ALPHA: 2, COLOR_ALPHA: 4}
DEPTHS = [
    *((GRAY, depth) for depth in (1, 2, 4, 8, 16)),
    *((PALETTE, depth) for depth in (1, 2, 4, 8)),
    *itertools.product((COLOR, GRAY_ALPHA, COLOR_ALPHA), (8, 16)),
]
HEIGHT, WIDTH = 13, 24
Samples = npt.NDArray[np.int64]


def png_of(samples: Samples, kind: int, depth: int, *chunks: bytes) -> bytes:
    """A PNG of (height, width, channels) samples."""
    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(raw))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


def samples_of(kind: int, depth: int) -> Samples:
    """All values of up to 8 bits, or many of 16, in every channel."""
    chance = np.random.default_rng(depth)
    samples = chance.integers(0, 2**depth, (HEIGHT, WIDTH, CHANNELS[kind]))
    samples[:2] = 0
    samples[2:4] = 2**depth - 1
    samples[4, :, -1] = np.arange(WIDTH) * (2**depth - 1) // WIDTH
    return samples


def eight_bits(samples: Samples, depth: int) -> Samples:
    return samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)


def on(background: tuple[int, int, int], color: Samples, alpha: Samples) -> Samples:
    """(height, width, 3 or 1) colors with (height, width, 1) alpha of 0 to 255."""
    share = alpha / 255
    return np.rint(color * share + np.array(background) * (1 - share)).astype(np.int64)


def decoded(data: bytes, **options: Any) -> Samples:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def same(ours: Samples, expected: Samples, tolerance: int = 0) -> None:
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance


COLORS = np.random.default_rng(1).integers(0, 256, (256, 3))


def palette_of(depth: int) -> bytes:
    return chunk(b"PLTE", COLORS[: 2**depth].astype(np.uint8).tobytes())


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 64, 128)])
@pytest.mark.parametrize(("kind", "depth"), DEPTHS)
def test_png(kind: int, depth: int, background: tuple[int, int, int]) -> None:
    samples = samples_of(kind, depth)
    if kind == PALETTE:
        same(decoded(png_of(samples, kind, depth, palette_of(depth))), COLORS[samples[..., 0]])
        return
    values = eight_bits(samples, depth)
    ours = decoded(png_of(samples, kind, depth), background=background)
    if kind in (GRAY, COLOR):
        same(ours, values)
    else:
        same(ours, on(background, values[..., :-1], values[..., -1:]), tolerance=1)


@pytest.mark.parametrize(("kind", "depth"), [pair for pair in DEPTHS if pair[0] < GRAY_ALPHA])
def test_png_with_a_transparent_color(kind: int, depth: int) -> None:
    samples = samples_of(kind, depth)
    colors = eight_bits(samples, depth)
    if kind == PALETTE:
        clear = np.arange(2**depth)[::-1] * 255 // (2**depth - 1)
        alpha, colors = clear[samples], COLORS[samples[..., 0]]
        chunks = [palette_of(depth), chunk(b"tRNS", clear.astype(np.uint8).tobytes())]
    else:
        color = samples[7, 5]
        alpha = 255 * (samples != color).any(axis=-1, keepdims=True)
        chunks = [chunk(b"tRNS", struct.pack(f">{len(color)}H", *color))]
    assert (alpha == 0).any()
    assert (alpha > 0).any()
    ours = decoded(png_of(samples, kind, depth, *chunks))
    same(ours, on((255, 255, 255), colors, alpha), tolerance=1 if kind == PALETTE else 0)


def test_16_bits_by_hand() -> None:
    """The scan that was a white square: its 8-bit copy is known without arithmetic."""
    values = np.array([[0, 0x00FF, 0x0100, 0x7F80, 0x80FF, 0xFEFF, 0xFF00, 0xFFFF]])
    ours = decoded(png_of(values[..., None], GRAY, 16))
    assert ours[0, :, 0].tolist() == [0, 0, 1, 0x7F, 0x80, 0xFE, 0xFF, 0xFF]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_as_pillow_writes_it(mode: str) -> None:
    gray = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 255 // (HEIGHT * WIDTH)).astype("u1")
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    buffer = BytesIO()
    (wide if mode == "I;16" else Image.fromarray(gray).convert(mode)).save(buffer, "PNG")
    ours = decoded(buffer.getvalue())
    if mode == "1":  # dithered
        assert set(np.unique(ours)) == {0, 255}
        assert abs(ours.mean() - gray.mean()) < 10
    else:
        same(ours, gray[..., None].astype(np.int64))


def flat(color: tuple[int, ...], mode: str) -> Image.Image:
    return Image.new(mode, (32, 24), color)


@pytest.mark.parametrize(
    ("ink", "shown"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 51), (204, 204, 0)),
    ],
)
@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_jpeg(ink: tuple[int, ...], shown: tuple[int, ...], marker: bool) -> None:
    """Browsers take the ink of every CMYK JPEG as inverted, as Adobe writes it."""
    buffer = BytesIO()
    flat(ink, "CMYK").save(buffer, "JPEG", quality=100)
    data = buffer.getvalue()
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    assert data.count(adobe) == 1  # and so its samples are inverted
    if not marker:
        data = data.replace(adobe, b"")
    same(decoded(data), np.full((24, 32, 3), shown), tolerance=2)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg(mode: str) -> None:
    color = (90,) if mode == "L" else (200, 100, 50)
    buffer = BytesIO()
    flat(color, mode).save(buffer, "JPEG", quality=100, subsampling=0)
    same(decoded(buffer.getvalue()), np.full((24, 32, 3), color), tolerance=3)


HALVES = Image.new("RGB", (32, 24), (250, 0, 0))
HALVES.paste((0, 0, 250), (16, 0, 32, 24))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(kind: str, orientation: int) -> None:
    """Rows and columns by the words of the Exif standard, of an image that is red to the left."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100}
    buffer = BytesIO()
    HALVES.save(buffer, kind, exif=exif, **options)
    ours = decoded(buffer.getvalue())
    # Where the stored left side is shown.
    side = ["left", "right", "right", "left", "top", "top", "bottom", "bottom"][orientation - 1]
    assert ours.shape == ((24, 32, 3) if side in ("left", "right") else (32, 24, 3))
    edge = {"left": ours[:, 0], "right": ours[:, -1], "top": ours[0], "bottom": ours[-1]}[side]
    assert (edge[:, 0] > 200).all()
    assert (edge[:, 2] < 50).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the module's own filter
def test_exif_that_is_damaged() -> None:
    expected = decoded(encode("JPEG", quality=90))
    data = encode("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decoded(data).shape == expected.shape


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_show_their_first_frame(kind: str) -> None:
    data = animation(kind)
    with Image.open(BytesIO(data)) as frames:
        first, second = (ImageOps.grayscale(_frame(frames, number)) for number in (0, 1))
    ours = decoded(data)[..., 0]
    assert np.abs(ours - np.asarray(first)).max() <= 2
    assert np.abs(ours - np.asarray(second)).max() > 20


def _frame(frames: Image.Image, number: int) -> Image.Image:
    frames.seek(number)
    return frames.convert("RGB")


def test_multi_picture_jpeg_shows_its_first_picture() -> None:
    buffer = BytesIO()
    first, second = flat((200, 0, 0), "RGB"), flat((0, 200, 0), "RGB")
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert Image.open(buffer).format == "MPO"
    same(decoded(buffer.getvalue()), np.full((24, 32, 3), (200, 0, 0)), tolerance=3)


def gif_frame(left: int, top: int, clear: int | None, screen: tuple[int, int] = (32, 24)) -> bytes:
    """A GIF whose only frame, 16 x 8 of red and blue columns, is part of its screen."""
    pixels = Image.new("P", (16, 8))
    pixels.putpalette([255, 0, 0, 0, 0, 255])
    pixels.paste(1, (8, 0, 16, 8))
    buffer = BytesIO()
    options: dict[str, Any] = {} if clear is None else {"transparency": clear}
    pixels.save(buffer, "GIF", optimize=False, **options)
    data = bytearray(buffer.getvalue())
    at = data.rindex(b",\0\0\0\0" + struct.pack("<HH", 16, 8))
    data[at + 1 : at + 5] = struct.pack("<HH", left, top)
    data[6:10] = struct.pack("<HH", *screen)
    return bytes(data)


@pytest.mark.parametrize("clear", [None, 0, 1])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (5, 3), (16, 16)])
def test_a_frame_that_is_part_of_its_gif(left: int, top: int, clear: int | None) -> None:
    expected = np.full((24, 32, 3), 255)
    for color, value in ((0, (255, 0, 0)), (1, (0, 0, 255))):
        start = left + 8 * color
        if color != clear:
            expected[top : top + 8, start : start + 8] = value
    same(decoded(gif_frame(left, top, clear)), expected)


def test_a_frame_larger_than_its_gif() -> None:
    ours = decoded(gif_frame(0, 0, None, (4, 4)))
    assert ours.shape == (8, 16, 3)
    assert ours[7, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_webp_alpha(alpha: int) -> None:
    buffer = BytesIO()
    flat((255, 0, 100, alpha), "RGBA").save(buffer, "WEBP", lossless=True, exact=True)
    share = alpha / 255
    shown = [round(c * share + 255 * (1 - share)) for c in (255, 0, 100)]
    same(decoded(buffer.getvalue()), np.full((24, 32, 3), shown), tolerance=1)


def test_color_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    color = (10, 200, 30)
    for kind in ("PNG", "WEBP"):
        buffer = BytesIO()
        flat(color, "RGB").save(buffer, kind, icc_profile=profile, lossless=True)
        same(decoded(buffer.getvalue()), np.full((24, 32, 3), color))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_what_cannot_be_decoded(kind: str) -> None:
    """CVE-2026-22778: a decoder's own words can tell of its memory."""
    data = encode(kind, (64, 64))
    with pytest.raises(ValueError, match=f"^{UNDECODABLE}$") as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.__suppress_context__


def test_an_image_is_decoded_as_what_was_checked() -> None:
    """A JPEG by its first bytes, and a whole FLI of other dimensions to a decoder that asks."""
    head = bytearray(b"\xff\xd8\xff\xe0\x11\xaf" + bytes(0x11AF - 2))
    struct.pack_into("<HHH", head, 6, 1, 13000, 13000)
    struct.pack_into("<IH", head, 128, 16, 0xF1FA)
    data = bytes(head) + encode("JPEG")[2:]
    assert Image.open(BytesIO(data), formats=["FLI", "JPEG"]).size == (13000, 13000)
    assert check_image(data, LIMITS, PARAM)[1:3] == (32, 24)
    assert decoded(data).shape == (24, 32, 3)
