# SPDX-License-Identifier: Apache-2.0
"""Images, and headers of images, as a client or a host might send them."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from himap_server.errors import GatewayError
from himap_server.security.images import ImageLimits, check_image
from PIL import Image

PARAM = "messages[0].content[0].image_url.url"
LIMITS = ImageLimits(max_bytes=100_000, max_pixels=1_000_000, min_side=8)
# What must never reach a client: addresses of hosts and of the heap, exceptions, queries, paths.
LEAK = re.compile(
    r"\d+\.\d+\.\d+|::|0x|object at|BytesIO|Errno|Error|Traceback|secret|/(home|usr|etc|tmp|work)/"
)


def refused(error: GatewayError) -> tuple[int, str]:
    """A refusal's status and reason, once its text is found clean."""
    assert error.param == PARAM
    assert not LEAK.search(error.detail), error.detail
    return error.status_code, error.reason


def encode(kind: str, size: tuple[int, int] = (32, 24), **options: Any) -> bytes:
    buffer = BytesIO()
    Image.effect_noise(size, 64).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A header that promises any size, with next to no data."""
    data = chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return png_header(width, height) + b"".join(chunks) + data


def webp_header(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + b"\0" * 80


def jpeg_of(width: int, height: int) -> bytes:
    data = encode("JPEG")
    return data.replace(struct.pack(">HH", 24, 32), struct.pack(">HH", height, width), 1)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(encode("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def animation(kind: str) -> bytes:
    rest = [Image.effect_noise((32, 24), 64 + i) for i in range(2)]
    return encode(kind, save_all=True, append_images=rest)


def check(data: bytes, limits: ImageLimits = LIMITS) -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        check_image(data, limits, PARAM)
    return refused(caught.value)


def jpeg_with_odd_metadata() -> bytes:
    entry = struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 200) + entry * 3
    body = struct.pack(">H", len(exif) + 2) + exif
    return b"\xff\xd8\xff\xe1" + body + encode("JPEG")[20:]
