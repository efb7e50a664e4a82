# SPDX-License-Identifier: Apache-2.0
"""Metadata of images: left out before a decoder reads it, whatever it is and however much."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from random import Random

import numpy as np
import pytest
from himap_server.decoding import decode_image
from himap_server.security.containers import _BLOCK, num_scans
from himap_server.security.images import ImageLimits, check_image
from PIL import Image

from tests.unit.image_files import PARAM, animation, check, chunk, encode

LIMITS = ImageLimits(max_bytes=20 << 20, max_pixels=1_000_000, min_side=8)
MEGABYTES = zlib.compress(b"\0" * (8 << 20))  # 8 kB that inflate to 8 MB
FILL = 8 << 20


def in_png(*chunks: bytes) -> bytes:
    data = encode("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def in_jpeg(junk: bytes) -> bytes:
    data = encode("JPEG")
    return data[:2] + junk + data[2:]


def scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (number - data.count(b"\xff\xda") + 1) + data[-2:]


def in_gif(junk: bytes) -> bytes:
    data = encode("GIF")
    end = 13 + (3 << (data[10] & 7) + 1)
    return data[:end] + junk + data[end:]


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def extension(label: int, body: bytes) -> bytes:
    blocks = [body[start : start + 255] for start in range(0, len(body), 255)]
    return b"!" + bytes([label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


ICC = chunk(b"iCCP", b"icc\0\0" + MEGABYTES)
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MEGABYTES)
HONEST = {
    "iCCP": in_png(ICC),
    "zTXt": in_png(chunk(b"zTXt", b"Comment\0\0" + MEGABYTES)),
    "iTXt": in_png(ITXT),
    "iTXt-behind-the-pixels": encode("PNG")[:-12] + ITXT + encode("PNG")[-12:],
    "tEXt": in_png(chunk(b"tEXt", b"Comment\0" + b"a" * (8 << 20))),
    "many-profiles": in_png(*[ICC] * 1000),
    "many-texts": in_png(*[chunk(b"zTXt", b"a\0\0" + MEGABYTES)] * 1000),
    "unknown-chunk": in_png(chunk(b"prVt", b"a" * 100)),
    "damaged-text": in_png(b"\0\0\0\4tEXta\0bcDEAD"),
    "jpeg-profile": in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"a" * 65000) * 255),
    "jpeg-xmp": in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"a" * 60000) * 99),
    "jpeg-photoshop": in_jpeg(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\0\0\0\0" * 5000) * 200
    ),
    "jpeg-exif": in_jpeg(
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + b"a" * 65000) * 200
    ),
    "jpeg-comments": in_jpeg(segment(0xFE, b"") * 4000),
    "jpeg-fill": in_jpeg(b"\xff" * FILL),
    "jpeg-fill-between": in_jpeg((segment(0xFE, b"") + b"\0" * 5000 + b"\xff\0" * 500) * 1000),
    "gif-comment": in_gif(extension(0xFE, b"a" * (8 << 20))),
    "gif-application": in_gif(extension(0xFF, b"XMP DataXMP" + b"a" * (8 << 20))),
    "gif-fill": in_gif(b"\0" * FILL),
}


@pytest.mark.parametrize("data", HONEST.values(), ids=HONEST)
def test_an_image_is_read_without_its_metadata(data: bytes) -> None:
    begun = time.process_time()
    checked = check_image(data, LIMITS, PARAM)
    image = decode_image(checked.data)
    assert time.process_time() - begun < 1
    assert len(checked.data) < 300_000
    assert image.size == (32, 24)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png-chunks": lambda: in_png(*[chunk(b"tEXt", b"")] * (1 << 20)),
    "png-pixel-chunks": lambda: in_png(*[chunk(b"IDAT", b"")] * (1 << 20)),
    "jpeg-segments": lambda: in_jpeg(segment(0xFE, b"") * (2 << 20)),
    "jpeg-tables": lambda: in_jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 100),
    "jpeg-resets": lambda: in_jpeg(b"\xff\xd0" * (4 << 20)),
    "jpeg-scans": lambda: scans(101),
    "gif-extensions": lambda: in_gif(extension(0xFF, b"") * (4 << 20)),
    "gif-blocks": lambda: in_gif(b"!\xfe" + b"\1a" * (4 << 20) + b"\0"),
}


def test_a_progressive_image_may_have_many_scans() -> None:
    image = decode_image(check_image(scans(100), LIMITS, PARAM).data)
    assert image.size == (32, 24)


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_far_too_many_parts_are_refused_at_once(make: Callable[[], bytes]) -> None:
    data = make()
    begun = time.process_time()
    assert check(data, LIMITS) == (400, "image_broken")
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_pixels_stay_as_they_were(kind: str, mode: str) -> None:
    picture = Image.effect_noise((50, 40), 90).convert("RGB").quantize(50)
    image = picture if mode == "P" and kind in ("PNG", "GIF") else picture.convert("RGB")
    if mode == "L":
        image = image.convert("L")
    buffer = BytesIO()
    image.save(buffer, kind, comment=b"a comment", dpi=(300, 300))
    data = buffer.getvalue()
    kept = check_image(data, LIMITS, PARAM).data
    with Image.open(BytesIO(data)) as expected, Image.open(BytesIO(kept)) as ours:
        assert np.array_equal(np.asarray(ours.convert("RGB")), np.asarray(expected.convert("RGB")))
        assert "comment" not in ours.info


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_keep_their_first_frame(kind: str) -> None:
    data = animation(kind)
    ours = decode_image(check_image(data, LIMITS, PARAM).data)
    with Image.open(BytesIO(data)) as expected:
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected.convert("RGB"))).max() <= 2


def test_nothing_is_copied_if_there_is_nothing_to_leave_out() -> None:
    data = encode("PNG")
    assert check_image(data, LIMITS, PARAM).data is data


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_stays(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = check_image(encode(kind, exif=exif), LIMITS, PARAM).data
    assert Image.open(BytesIO(data)).getexif()[0x0112] == 6


def test_a_file_that_ends_early_is_read_as_far_as_it_goes() -> None:
    """As before: what comes behind the pixels does not matter."""
    data = encode("PNG")
    assert decode_image(check_image(data[:-12], LIMITS, PARAM).data).size == (32, 24)
    assert decode_image(check_image(data + b"junk" * 99, LIMITS, PARAM).data).size == (32, 24)


@pytest.mark.parametrize("size", [0, 1, 2, _BLOCK - 1, _BLOCK, _BLOCK + 1, _BLOCK + 2, 3 * _BLOCK])
def test_scans_are_counted_across_blocks(size: int) -> None:
    random = Random(size)
    for start in (0, 1, size // 2):
        data = bytes(random.choices(b"\xff\xda\0", k=size))
        assert num_scans(data, start) == data.count(b"\xff\xda", start)
