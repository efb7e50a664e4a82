# SPDX-License-Identifier: Apache-2.0
"""Images that clients name by a `uuid`, so that they need not send them again.

vLLM has names of its own: it takes an image by its `uuid` from the cache of processed images,
whoever sent it, and fails if the cache has dropped it (`BaseMultiModalProcessor.
_get_cache_missing_items`). So no name reaches vLLM. The gateway keeps the checked bytes, apart for
each API key, and vLLM gets them as if they had been sent. vLLM's names can take over when it keeps
them apart by client and tells a client what it has dropped.
"""

from __future__ import annotations

from collections import OrderedDict

from .errors import GatewayError, Reason
from .security.images import CheckedImage
from .security.keys import Key

_MAX_CHARS = 256
_OF_AN_ENTRY = 1024  # bytes, beside an image's


class NamedImages:
    """The last image that each API key sent under each name, as far as the memory goes."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is of all images together, encoded, with names; those used last stay."""
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: OrderedDict[tuple[str, str], CheckedImage] = OrderedDict()

    def remember(self, key: Key | None, name: str, image: CheckedImage) -> None:
        """Keep an image; without an API key nobody could tell whose it is."""
        if key is None:
            return
        entry = key.sha256, name  # another key may get this one's name
        self._forget(entry)  # the name is not the older image's any more
        if _num_bytes(entry, image) > self._max_bytes:
            return
        self._images[entry] = image
        self._num_bytes += _num_bytes(entry, image)
        while self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._images)))

    def find(self, key: Key | None, name: str, path: str) -> CheckedImage:
        """The image that the API key sent last under a name.

        Args:
            key: the API key.
            name: a part's `uuid`.
            path: the part, for the error.

        Raises:
            GatewayError: HTTP 400.
        """
        if key is None or not self._max_bytes:
            why = "has no API keys" if key is None else "keeps no images (--max-named-image-bytes)"
            raise _refusal(f"this server {why}: send the image with its uuid", path)
        entry = key.sha256, name
        if entry not in self._images:
            text = "no image with this uuid is kept for this API key: send the image again"
            raise _refusal(text, path)
        self._images.move_to_end(entry)
        return self._images[entry]

    def _forget(self, entry: tuple[str, str]) -> None:
        if entry in self._images:
            self._num_bytes -= _num_bytes(entry, self._images.pop(entry))


def _num_bytes(entry: tuple[str, str], image: CheckedImage) -> int:
    """Memory of an entry: a name's characters take up to four bytes."""
    return len(image.data) + 4 * len(entry[1]) + _OF_AN_ENTRY


def name_of(part: dict[str, object], path: str) -> str | None:
    """The `uuid` of a part; None if it has none.

    Raises:
        GatewayError: HTTP 400.
    """
    name = part.get("uuid")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= _MAX_CHARS):
        text = f"{path}.uuid must be a string of 1 to {_MAX_CHARS} characters"
        raise GatewayError(400, text, reason=Reason.INVALID, param=f"{path}.uuid")
    return name


def _refusal(text: str, path: str) -> GatewayError:
    return GatewayError(400, text, reason=Reason.IMAGE_UUID, param=f"{path}.uuid")
