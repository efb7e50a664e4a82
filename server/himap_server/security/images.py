# SPDX-License-Identifier: Apache-2.0
"""Checks whether the engine may decode an image, however the image came."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import pybase64
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import GatewayError, Reason
from .containers import without_metadata

# Pillow's own classes instead of Image.open: each reads one format, no multi-picture JPEG (MPO),
# and has no limit of its own. They read the header; none decodes pixels before load().
_FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[BytesIO], ImageFile]], ...] = (
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("jpeg", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("webp", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), WebPImageFile),
    ("gif", re.compile(rb"GIF8[79]a"), GifImageFile),
)

# What clients and hosts call images of these formats, and what they say for "some bytes". The magic
# bytes decide. Other names are refused: vLLM took `data:video/jpeg` for thousands of frames
# (CVE-2026-5497).
_TYPES = re.compile(
    r"(image(/(x-|x-citrix-|vnd\.mozilla\.)?(a?png|p?jpe?g|jpe|jfif|webp|gif|\*))?"
    r"|(application|binary)/(octet-stream|(x-|force-|x-force-)?download|x-binary|unknown)"
    r"|text/plain|\*/\*)?",
    re.IGNORECASE,
)
_MAX_TYPE = 1024
_SPACES = " \t\r\n\f"
# What encoders of URLs escape of base64.
_ESCAPES = {"%2b": "+", "%2f": "/", "%3d": "=", "%0a": "\n", "%0d": "\r"}
# A space that does not indent a line.
_LONE_SPACE = re.compile(r" (?<=[^ \t\r\n\f] ) *[^ \t\r\n\f]")
_EXAMPLE = "data:image/png;base64,..."
_URL_SAFE = bytes.maketrans(b"-_", b"+/")

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
    """An image that may be decoded.

    Attributes:
        kind: "png", "jpeg", "webp" or "gif".
        width, height: in pixels, before it is turned upright.
        data: the file without metadata, for the decoder.
    """

    kind: str
    width: int
    height: int
    data: bytes


def check_image(data: bytes, limits: ImageLimits, param: str) -> CheckedImage:
    """The image's format and size, and what of it the decoder gets.

    They come from the content, whatever a header or a URL declares, and without decoding it: vLLM
    PR #47010 (a decompression bomb), CVE-2026-22773 (a 1x1 image ended the engine).

    Raises:
        GatewayError: HTTP 400, or 413 for too many bytes. Its text is never a decoder's, which may
            contain heap addresses (CVE-2026-22778).
    """
    if len(data) > limits.max_bytes:
        raise _too_large(limits, param)
    kind = next((kind for kind, magic, _ in _FORMATS if magic.match(data)), None)
    if kind is None:
        raise _refusal(Reason.IMAGE_TYPE, "the image must be PNG, JPEG, WebP or GIF", param)
    try:
        data = without_metadata(kind, data)
        with open_image(data) as image:
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
    return CheckedImage(kind, width, height, data)


def open_image(data: bytes) -> ImageFile:
    """The image in one of the four formats, its header read.

    Raises:
        ValueError: it is in no such format.
        Exception: the header is damaged.
    """
    for _, magic, decoder in _FORMATS:
        if magic.match(data):
            return decoder(BytesIO(data))
    raise ValueError("not a PNG, JPEG, WebP or GIF")


def may_be_image(kind: str) -> bool:
    """Whether a media type, parameters included, can be that of an image which `check_image` takes.

    A missing one can.
    """
    return _TYPES.fullmatch(kind.partition(";")[0].strip(_SPACES)) is not None


def decode_data_url(url: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes of a data URL, not yet checked by `check_image`.

    Its base64 may be in lines, without padding, URL-safe, and percent-encoded once.

    Raises:
        GatewayError: HTTP 400, or 413 for too many bytes.
    """
    comma = url.find(",", 0, _MAX_TYPE)
    kind, *parameters = url[len("data:") : max(comma, 0)].split(";")
    if not may_be_image(kind):
        message = "the data URL must have the type of a PNG, JPEG, WebP or GIF image"
        raise _refusal(Reason.IMAGE_TYPE, f"{message}: {_EXAMPLE}", param)
    if comma < 0 or "base64" not in [text.strip(_SPACES).lower() for text in parameters]:
        message = "the data URL must have ;base64, before its data"
        raise _refusal(Reason.IMAGE_TYPE, f"{message}: {_EXAMPLE}", param)
    text = url[comma + 1 :]
    # Check before anything makes a second copy. An escape has three characters.
    longest = (limits.max_bytes + 2) // 3 * 4
    if len(text) > 3 * longest:
        raise _too_large(limits, param)
    try:
        if len(text) <= longest:
            with suppress(ValueError):
                return pybase64.b64decode(text, validate=True)
        raw = _plain_base64(text)
        if len(raw) > longest:
            raise _too_large(limits, param)
        return pybase64.b64decode(raw, validate=True)
    except ValueError as error:
        wrong = "has other characters than A-Z, a-z, 0-9, +, / and = at its end"
        message = str(error) if isinstance(error, _Base64Error) else wrong
        message = f"the base64 of the image's data URL {message}"
        raise _refusal(Reason.IMAGE_BROKEN, message, param) from None


class _Base64Error(ValueError):
    """What is wrong, after "the base64"."""


def _plain_base64(text: str) -> bytes:
    """Base64 in the standard alphabet, padded, and without line breaks."""
    if not text.isascii():
        raise _Base64Error("has characters that are not ASCII")
    if "%" in text:
        for escape, character in _ESCAPES.items():
            text = text.replace(escape, character).replace(escape.upper(), character)
    text = text.strip(_SPACES)
    if _LONE_SPACE.search(text):
        raise _Base64Error("has spaces; a + that is not escaped becomes one")
    raw = text.encode().translate(_URL_SAFE, _SPACES.encode())
    digits = raw.rstrip(b"=")
    if len(digits) % 4 == 1:
        raise _Base64Error("is cut off: a character is missing or too many")
    if len(raw) - len(digits) > 2:
        raise _Base64Error("has more than two = at its end")
    return digits + b"=" * (-len(digits) % 4)


def _too_large(limits: ImageLimits, param: str) -> GatewayError:
    message = f"the image has more than {limits.max_bytes} bytes; make it smaller"
    return _refusal(Reason.IMAGE_BYTES, message, param, 413)


def _refusal(reason: Reason, message: str, param: str, status: int = 400) -> GatewayError:
    return GatewayError(status, message, reason=reason, param=param)
