# SPDX-License-Identifier: Apache-2.0
"""Which images the gateway lets through to the engine; data URLs.

One test or more for each advisory on images in vLLM and its neighbours, named in the test's id.
"""

from __future__ import annotations

import base64
import gc
import random
import re
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO

import pytest
from himap_server.errors import GatewayError
from himap_server.security.images import ImageLimits, check_image, decode_data_url
from PIL import Image, UnidentifiedImageError

from tests.unit.image_files import (
    LIMITS,
    PARAM,
    animation,
    check,
    encode,
    gif_of,
    jpeg_of,
    jpeg_with_odd_metadata,
    png,
    png_header,
    refused,
    webp_header,
)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_format(kind: str) -> None:
    assert check_image(encode(kind), LIMITS, PARAM).kind == kind


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animation(kind: str) -> None:
    data = animation(kind)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    assert check_image(data, LIMITS, PARAM).kind == kind


FOREIGN = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "tiff": encode("TIFF"),
    "CVE-2026-22778-jpeg2000": encode("JPEG2000"),
    "bmp": encode("BMP"),
    "ico": encode("ICO"),
    "ppm": encode("PPM"),
    "tga": encode("TGA"),
    "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
    "html": b"<!doctype html><title>Sign in</title>",
    "avi-in-riff": b"RIFF\x64\0\0\0AVI LIST" + b"\0" * 100,
    "webp-of-another-kind": b"RIFF\x64\0\0\0WEBPVP9 " + b"\0" * 100,
    "png-behind-junk": b"\n" + encode("PNG"),
    "empty": b"",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_foreign_bytes_are_refused_whatever_is_declared(data: bytes) -> None:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    decoded = decode_data_url(url, LIMITS, PARAM)
    assert decoded == data
    assert check(decoded) == (400, "image_type")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(1001, 1000), id="vLLM-47010-png"),
        pytest.param(png(10_000, 10_000), id="vLLM-47010-png-that-pillow-warns-of"),
        pytest.param(png(2**31 - 1, 2**31 - 1), id="vLLM-47010-png-that-pillow-refuses"),
        pytest.param(jpeg_of(65_000, 65_000), id="vLLM-47010-jpeg"),
        pytest.param(webp_header(16_000, 16_000), id="vLLM-47010-webp"),
        pytest.param(webp_header(16_000, 16_000).replace(b"d", b"\n", 1), id="webp-newline"),
        pytest.param(gif_of(65_000, 65_000), id="vLLM-47010-gif"),
    ],
)
def test_bomb(data: bytes) -> None:
    assert len(data) < 4000
    assert check(data) == (400, "image_pixels")


def test_png_with_two_headers() -> None:
    assert check(png(32, 24, png_header(60_000, 60_000)[8:])) == (400, "image_broken")


def test_pixels_at_the_limit() -> None:
    assert check_image(png(1000, 1000), LIMITS, PARAM).kind == "png"


def test_pillows_own_limit_is_not_touched() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(png(60_000, 60_000)))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 1), id="CVE-2026-22773"),
        pytest.param((7, 64), id="narrow"),
        pytest.param((64, 7), id="flat"),
    ],
)
def test_side(size: tuple[int, int]) -> None:
    assert check(encode("PNG", size)) == (400, "image_side")


def test_side_at_the_limit() -> None:
    assert check_image(encode("PNG", (8, 8)), LIMITS, PARAM).kind == "png"


def test_bytes() -> None:
    data = encode("PNG")
    exact = ImageLimits(len(data), LIMITS.max_pixels, LIMITS.min_side)
    assert check_image(data, exact, PARAM).kind == "png"
    assert check(data + b"\0", exact) == (413, "image_bytes")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_truncated_header(kind: str) -> None:
    data = encode(kind)
    length = 16 if kind == "webp" else 12
    assert check(data[:length]) == (400, "image_broken")


def test_decoder_text_stays_inside() -> None:
    """CVE-2026-22778: "cannot identify image file <_io.BytesIO object at 0x7f...>"."""
    data = png(64, 64).replace(b"\x08\x02\0\0\0", b"\x08\x02\0\0\1")  # the checksum is wrong now
    with pytest.raises(UnidentifiedImageError, match="BytesIO object at 0x"):
        Image.open(BytesIO(data))
    with pytest.raises(GatewayError) as caught:
        check_image(data, LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_broken")
    assert caught.value.__suppress_context__


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the module's own filter
def test_any_mutation_is_an_image_or_a_refusal() -> None:
    chance = random.Random(0)
    seeds = [encode(kind) for kind in ("png", "jpeg", "webp", "gif")]
    seeds += [animation("gif"), animation("webp"), animation("png"), jpeg_with_odd_metadata()]
    outcomes = set()
    for _ in range(600):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(4, min(len(data), 200))] = chance.choice(b"\0\x01\x7f\xff,!\xda")
        if chance.random() < 0.3:
            del data[chance.randrange(12, len(data)) :]
        try:
            outcomes.add(check_image(bytes(data), LIMITS, PARAM).kind)
        except GatewayError as error:
            outcomes.add(refused(error)[1])
    assert {"png", "jpeg", "webp", "gif", "image_broken", "image_pixels", "image_type"} <= outcomes


def test_no_warning_surfaces() -> None:
    """In a process of its own: pytest has its own filters."""
    code = """if True:
        import sys, warnings
        from himap_server.security.images import ImageLimits, check_image
        from tests.unit.image_files import LIMITS, animation, gif_of
        from tests.unit.image_files import jpeg_with_odd_metadata, png
        large = ImageLimits(10**6, 10**9, 1)
        frame = bytearray(gif_of(10, 10))
        at = frame.index(b",", 13 + 768)
        frame[at + 5 : at + 9] = b"\\x10\\x27" * 2
        for _ in ("real", "control"):
            check_image(jpeg_with_odd_metadata(), LIMITS, "")
            check_image(png(10_000, 10_000), large, "")
            check_image(bytes(frame), large, "")
            print("control", file=sys.stderr)
            warnings.resetwarnings()
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    real, control, _ = done.stderr.split("control\n")
    assert real == ""
    assert "UserWarning" in control
    assert "DecompressionBombWarning" in control


@pytest.mark.parametrize(
    "data",
    [b"BM" + b"\0" * 999, png(9999, 9999), png(4, 4), png_header(64, 64), b"\0" * 100_001],
    ids=["image_type", "image_pixels", "image_side", "image_broken", "image_bytes"],
)
def test_refused_bytes_are_freed_at_once(data: bytes) -> None:
    """Without waiting for the collector of cycles, which large images would outrun."""
    data = bytes(bytearray(data))
    before = sys.getrefcount(data)
    gc.disable()
    try:
        with suppress(GatewayError):
            assert not check_image(data, LIMITS, PARAM)
        assert sys.getrefcount(data) == before
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------ data URLs


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_data_url_round_trip(kind: str) -> None:
    data = encode(kind)
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    assert decode_data_url(url, LIMITS, PARAM) == data


@pytest.mark.parametrize(
    "prefix",
    [
        *("DATA:Image/PNG;Base64,", "data:image/jpg;base64,", "data:image/*;base64,"),
        *("data:image;base64,", "data:image/pjpeg;base64,", "data:image/x-png;base64,"),
        *("data:image/apng;base64,", "data:image/jfif;base64,", "data:image/X-CITRIX-JPEG;base64,"),
        *("data:application/octet-stream;base64,", "data:binary/octet-stream;base64,"),
        *("data:application/x-download;base64,", "data:text/plain;base64,", "data:;base64,"),
        *("data:image/png;charset=utf-8;base64,", "data:image/png;name=photo.png;base64,"),
        *("data:image/png;base64;charset=utf-8,", "data:image/png;base64;base64,"),
        *("data:image/png ; base64 ,", "data: image/png;name=a%20b;x;BASE64,", "data:*/*;base64,"),
    ],
)
def test_data_url_spellings(prefix: str) -> None:
    """The type is what a client happens to call the file; its bytes decide."""
    assert decode_data_url(prefix + "AAAA", LIMITS, PARAM) == b"\0\0\0"


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("data:video/jpeg;base64,", id="CVE-2026-5497"),
        *("data:image/svg+xml;base64,", "data:image/tiff;base64,", "data:image/jp2;base64,"),
        *("data:image/jpeg2000;base64,", "data:image/heic;base64,", "data:image/;base64,"),
        *("data:text/html;base64,", "data:application/pdf;base64,", "data:imagex;base64,"),
        *("data:image/png/x;base64,", "data:x/image/png;base64,", "data:image/png\0;base64,"),
        *("data:image/png,", "data:image/png;base64", "data:image/png;charset=base64,", "data:,"),
        *("data:" + " " * 2000 + "image/png;base64,", "data:base64,"),
    ],
)
def test_data_url_types(prefix: str) -> None:
    with pytest.raises(GatewayError, match=r"the data URL must have .*data:image/png") as caught:
        decode_data_url(prefix + "AAAA", LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_type")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n    ", " \n\t", "%0A", "%0d%0a"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("length", [255, 256, 257])
def test_data_url_base64_forms(
    newline: str, safe: bool, padded: bool, escaped: bool, length: int
) -> None:
    data = random.Random(0).randbytes(length)
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    if not padded:
        text = text.rstrip("=")
    forms = {text, text + newline, newline + text, newline.join(re.findall(".{1,76}", text))}
    for form in forms:
        if escaped:
            for character in "+/=":
                form = form.replace(character, f"%{ord(character):02X}")
        assert decode_data_url("data:image/png;base64," + form, LIMITS, PARAM) == data


@pytest.mark.parametrize(
    ("junk", "wrong"),
    [
        *(("A", "cut off"), ("AAAAA", "cut off"), ("AAAA=A", "other characters")),
        *(("AA=A", "other characters"), ("AAAA====", "more than two ="), ("A?AA", "other")),
        *(("AA AA", "spaces"), ("AAAA  AAAA", "spaces"), ("AAAA AAAA\n", "spaces")),
        *(("AA\xe9=", "not ASCII"), ("\udc80AAA", "not ASCII"), ("AA\0A", "other characters")),
        # Never decoded twice.
        *(("AAA%252B", "other"), ("AA%253D%253D", "other"), ("AAA%2\nB", "other")),
        *(("AAA%41", "other"), ("AAA%", "other"), ("%%2B2BAA", "other")),
    ],
)
def test_data_url_base64_that_is_no_such_thing(junk: str, wrong: str) -> None:
    with pytest.raises(GatewayError, match=f"the base64 of .* {wrong}") as caught:
        decode_data_url("data:image/png;base64," + junk, LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_broken")


@pytest.mark.parametrize("text", [" ", "\n", "\n ", "A\n", "% ", "%0A", "=", "A B", "-", "  A\n"])
def test_data_url_base64_of_megabytes_is_quick(text: str) -> None:
    """The event loop cannot run beside most of it."""
    limits = ImageLimits(5 << 20, 1000, 1)
    begun = time.process_time()
    with suppress(GatewayError):
        decode_data_url("data:image/png;base64," + text * ((6 << 20) // len(text)), limits, PARAM)
    assert time.process_time() - begun < 0.5


def test_data_url_length_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, too_long = (
        base64.b64encode(b"\0" * 100_000).decode(),
        "*" * 140_000,
    )  # though none of it is base64
    assert len(decode_data_url("data:image/png;base64," + fits, LIMITS, PARAM)) == 100_000
    monkeypatch.setattr("himap_server.security.images.pybase64", None)
    with pytest.raises(GatewayError) as caught:
        decode_data_url("data:image/png;base64," + too_long, LIMITS, PARAM)
    assert refused(caught.value) == (413, "image_bytes")
