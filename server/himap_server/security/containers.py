# SPDX-License-Identifier: Apache-2.0
"""Image files without their metadata: a decoder gets pixels, tables and orientation only.

Pillow reads metadata in Python, inflates it, and keeps it. 8 MB of empty comments of a JPEG took
19 s, and 10 MB of color profiles of a PNG 20 s. An honest text or profile of more than 1 MB made it
refuse a PNG. None of it changes a pixel.

WebP files are left as they are: their reader is in C, and takes time in proportion to their size.
"""

from __future__ import annotations

import re

import numpy as np

# A PNG of 20 MB in chunks of 1 kB has 20,000; depth maps of phones take some hundred segments.
_MAX_CHUNKS = 1 << 15
_MAX_SEGMENTS = 1 << 12
_MAX_BLOCKS = 1 << 16
# A progressive JPEG has about ten. Each costs a pass over all pixels, however few bytes it has.
_MAX_SCANS = 100
# Of a JPEG before its pixels. Tables and Exif have 64 kB each at most.
_MAX_JPEG_HEADER = 1 << 20
_BLOCK = 1 << 17  # bytes that stay in a processor's cache

_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_END, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
# These two tell in which color space the samples are.
_JFIF, _ADOBE = 0xE0, 0xEE
_GIF_BLOCK = re.compile(rb"[!,;]")


def without_metadata(kind: str, data: bytes) -> bytes:
    """The file as its decoder needs it; `data` itself if there is nothing to leave out.

    Args:
        kind: "png", "jpeg", "webp" or "gif".
        data: the file, which begins as one of that kind.

    Raises:
        ValueError, IndexError: its structure is damaged, or has far too many parts.
    """
    kept = _KEPT[kind](data) if kind in _KEPT else [(0, len(data))]
    if sum(end - start for start, end in kept) == len(data):
        return data
    view = memoryview(data)
    return b"".join(view[start:end] for start, end in kept)


_Pieces = list[tuple[int, int]]


def _png(data: bytes) -> _Pieces:
    kept: _Pieces = [(0, 8)]
    seen: set[bytes] = set()
    place = 8
    for _ in range(_MAX_CHUNKS):
        name = data[place + 4 : place + 8]
        end = min(place + 12 + int.from_bytes(data[place : place + 4], "big"), len(data))
        if (name == b"IHDR") != (place == 8):
            raise ValueError("IHDR is not the first chunk, and the only one")
        if (
            name in (b"IHDR", b"IDAT", b"IEND")
            or (name in (b"PLTE", b"tRNS") and b"IDAT" not in seen)
            or (name == b"eXIf" and name not in seen)
        ):
            kept.append((place, end))
        seen.add(name)
        place = end
        if name == b"IEND" or place == len(data):
            return kept
    raise ValueError("too many chunks")


def _jpeg(data: bytes) -> _Pieces:
    kept: _Pieces = [(0, 2)]
    place, size, has_exif = 2, 0, False
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, place)
        if match is None or match[1][0] == _END:
            break
        marker, start = match[1][0], match.start()
        place = start + 2
        if marker in _NO_LENGTH:
            continue
        if marker == _START_OF_SCAN:
            if num_scans(data, start) > _MAX_SCANS:
                raise ValueError("too many scans")
            kept.append((start, len(data)))
            return kept
        place += max(2, int.from_bytes(data[place : place + 2], "big"))
        is_exif = marker == _APP1 and data.startswith(b"Exif\0\0", start + 4) and not has_exif
        has_exif |= is_exif
        if marker < _JFIF or marker in (_JFIF, _ADOBE) or is_exif:
            kept.append((start, place))
            size += place - start
            if size > _MAX_JPEG_HEADER:
                break
    raise ValueError("no pixels after the header, or too large a header")


def num_scans(data: bytes, start: int = 0) -> int:
    """Scans of a JPEG from `start` on; pixels can't look like the start of one.

    `bytes.count` takes 6 ms for a photo, with the interpreter lock held, and three times that for
    hostile files. NumPy takes a tenth, and does not hold it.
    """
    octets = np.frombuffer(data, np.uint8)
    count = 0
    for place in range(start, len(octets), _BLOCK):
        block = octets[place : place + _BLOCK + 1]
        count += int(np.count_nonzero((block[:-1] == 0xFF) & (block[1:] == 0xDA)))
    return count


def _gif(data: bytes) -> _Pieces:
    flags = data[10]
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept: _Pieces = [(0, place)]
    control: _Pieces = []
    blocks = 0
    while match := _GIF_BLOCK.search(data, place):
        start = match.start()
        if match[0] == b",":
            return [*kept, *control, (start, len(data))]
        if match[0] == b";":
            break
        place = start + 2
        while length := data[place]:
            place += 1 + length
            blocks += 1
        place += 1
        blocks += 1
        if blocks > _MAX_BLOCKS:
            break
        if data[start + 1] == 0xF9:
            control = [(start, place)]
    raise ValueError("no image, or far too much before it")


_KEPT = {"png": _png, "jpeg": _jpeg, "gif": _gif}
