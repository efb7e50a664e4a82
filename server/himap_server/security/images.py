# SPDX-License-Identifier: Apache-2.0
"""Checks whether the engine may decode an image, however the image came."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import pybase64
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import GatewayError, Reason

# Pillow's own classes instead of Image.open: each reads one format, no multi-picture JPEG (MPO),
# and has no limit of its own. They read the header; none decodes pixels before load().
_FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[BytesIO], ImageFile]], ...] = (
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("jpeg", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("webp", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), WebPImageFile),
    ("gif", re.compile(rb"GIF8[79]a"), GifImageFile),
)
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)

# An image has these once, a hostile one a thousand times. Pillow inflates each colour profile of a
# PNG, up to 1 MiB (10 MB of profiles took 20 s). It appends each Exif segment of a JPEG to those
# before it, which takes time in the square of their number (16 MB took 114 s).
_ONCE = {"png": b"iCCP", "jpeg": b"Exif\0\0"}
_MAX_REPEATED = 8
_MAX_LOOK_ALIKES = 100_000

# Pillow reads up to the size only. Photos have megabytes before it, in depth maps.
_MAX_HEADER = 8 << 20

# Pillow warns about odd metadata. A client can vary the texts of warnings without end, and Python
# keeps each text. The filter is global because catch_warnings is not safe in threads.
for _category in (UserWarning, DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of an image. `min_side` applies to width and height, in pixels."""

    max_bytes: int
    max_pixels: int
    min_side: int


class CheckedImage(NamedTuple):
    """An image that may be decoded: "png", "jpeg", "webp" or "gif", and its number of pixels."""

    kind: str
    pixels: int


def check_image(data: bytes, limits: ImageLimits, param: str) -> CheckedImage:
    """The image's format and size.

    They come from the content, whatever a header or a URL declares, and without decoding it: vLLM
    PR #47010 (a decompression bomb), CVE-2026-22773 (a 1x1 image ended the engine).

    Raises:
        GatewayError: HTTP 400, or 413 for too many bytes. Its text is never a decoder's, which may
            contain heap addresses (CVE-2026-22778).
    """
    if len(data) > limits.max_bytes:
        raise _too_large(limits, param)
    matches = ((kind, decoder) for kind, magic, decoder in _FORMATS if magic.match(data))
    kind, decoder = next(matches, ("", None))
    if decoder is None:
        raise _refusal(Reason.IMAGE_TYPE, "the image must be PNG, JPEG, WebP or GIF", param)
    try:
        if kind in _ONCE and _repeats(data, _ONCE[kind]):
            raise ValueError
        # The WebP decoder needs the whole file.
        header = data if kind == "webp" else data[:_MAX_HEADER]
        with decoder(BytesIO(header)) as image:
            width, height = image.size
        too_many = width * height > limits.max_pixels
    except DecompressionBombError:
        too_many = True
    except Exception:  # decoders raise all kinds of exceptions
        raise _refusal(Reason.IMAGE_BROKEN, "the image is damaged; save it again", param) from None
    if too_many:
        message = f"the image has more than {limits.max_pixels} pixels; scale it down"
        raise _refusal(Reason.IMAGE_PIXELS, message, param)
    if min(width, height) < limits.min_side:
        message = f"the image must be at least {limits.min_side} pixels wide and high"
        raise _refusal(Reason.IMAGE_SIDE, message, param)
    return CheckedImage(kind, width * height)


def _repeats(data: bytes, name: bytes) -> bool:
    """Whether a name occurs too often. `bytes.count` takes ten times as long."""
    values = np.frombuffer(data, np.uint8)
    found = np.flatnonzero((values[:-1] == name[0]) & (values[1:] == name[1]))
    if len(found) > _MAX_LOOK_ALIKES:
        return True
    return sum(data.startswith(name, int(place)) for place in found) > _MAX_REPEATED


def decode_data_url(url: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes of a data URL, not yet checked by `check_image`.

    It takes four types only: vLLM takes `data:video/jpeg` for thousands of frames (CVE-2026-5497).

    Raises:
        GatewayError: HTTP 400, or 413 for too many bytes.
    """
    match = _DATA_URL.match(url)
    if match is None:
        message = "a data URL must begin with data:image/png;base64, (or jpeg, webp, gif)"
        raise _refusal(Reason.IMAGE_TYPE, message, param)
    # Check before the decoder makes a second copy.
    if len(url) - match.end() > (limits.max_bytes + 2) // 3 * 4:
        raise _too_large(limits, param)
    try:
        return pybase64.b64decode(url[match.end() :], validate=True)
    except ValueError:
        message = "the image's data URL is not valid base64"
        raise _refusal(Reason.IMAGE_BROKEN, message, param) from None


def _too_large(limits: ImageLimits, param: str) -> GatewayError:
    message = f"the image has more than {limits.max_bytes} bytes; make it smaller"
    return _refusal(Reason.IMAGE_BYTES, message, param, 413)


def _refusal(reason: Reason, message: str, param: str, status: int = 400) -> GatewayError:
    return GatewayError(status, message, reason=reason, param=param)
