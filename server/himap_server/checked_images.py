# SPDX-License-Identifier: Apache-2.0
"""Checked images on their way into vLLM: as bytes, decoded once.

The gateway replaces the URL of each image by one that only the store knows. vLLM's media connector
is asked for that URL, and decodes the bytes that were checked (decoding.py).

* `vllm.multimodal.media.connector.MEDIA_CONNECTOR_REGISTRY` (called),
  `vllm.multimodal.media.connector.MediaConnector` (subclassed): the registry is vLLM's extension
  point for sources of media; a data URL would be encoded and decoded once more. Remove when: vLLM's
  handlers take images as bytes.
* `vllm.multimodal.media.image.ImageMediaIO.rgba_background_color` (read),
  `vllm.multimodal.media.base.MediaWithBytes` (called): vLLM's decoder tries 37 formats in turn, so
  that a file that begins as a JPEG can be opened as a FLI of other dimensions, and makes white of
  16-bit gray. `image_mode` has no effect here. Remove when: vLLM has a setting for the formats, and
  shows images of every mode as a browser does.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from PIL import Image
from typing_extensions import override
from vllm.multimodal.media.base import MediaIO, MediaWithBytes
from vllm.multimodal.media.connector import (
    MEDIA_CONNECTOR_REGISTRY,
    MediaConnector,
    global_thread_pool,
)
from vllm.multimodal.media.image import ImageMediaIO

from .decoding import Room, decode_image
from .record import Picture, current

CONNECTOR = "himap"
"""Name of the connector, as the value of `VLLM_MEDIA_CONNECTOR`."""


class StoredImage(NamedTuple):
    """Bytes of a checked image, and the factor by which its decoder scales it down."""

    data: bytes
    factor: int


class ImageStore:
    """Checked images, by the URLs that stand for them in requests."""

    def __init__(self, max_pixels: int) -> None:
        """`max_pixels` is of images that are decoded at the same time."""
        self.room = Room(max_pixels)
        self._images: dict[str, StoredImage] = {}

    def add(self, data: bytes, factor: int = 1) -> str:
        """Keep an image; returns its URL."""
        url = f"himap-image:{uuid.uuid4().hex}"
        self._images[url] = StoredImage(data, factor)
        return url

    def get(self, url: str) -> StoredImage:
        """The image of a URL.

        Raises:
            ValueError: the store has no such image.
        """
        if url not in self._images:
            raise ValueError("the gateway has checked no image with this URL")
        return self._images[url]

    def remove(self, urls: Iterable[str]) -> None:
        """Forget images."""
        for url in urls:
            del self._images[url]

    def register(self) -> None:
        """Let vLLM take images from this store, and from nowhere else."""
        MEDIA_CONNECTOR_REGISTRY.name2class[CONNECTOR] = partial(_StoreConnector, self)


class _StoreConnector(MediaConnector):
    """Knows the URLs of a store only: it fetches nothing and reads no file or data URL."""

    def __init__(self, store: ImageStore, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._store = store

    @override
    def load_from_url(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        return _decode(self._store.get(url), self._store.room, media_io)[0]

    @override
    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        image = self._store.get(url)
        loop = asyncio.get_running_loop()
        media, seconds = await loop.run_in_executor(
            global_thread_pool, _decode, image, self._store.room, media_io
        )
        if (record := current.get(None)) is not None:
            record.decoding += seconds
            width, height = (image.factor * side for side in media.media.size)
            record.pictures[url] = Picture(width, height, image.factor)
        return media


def _decode(
    stored: StoredImage, room: Room, media_io: MediaIO[Any]
) -> tuple[MediaWithBytes[Image.Image], float]:
    if not isinstance(media_io, ImageMediaIO):
        raise TypeError("the gateway lets images through only")
    begun = time.perf_counter()
    background = media_io.rgba_background_color
    image = decode_image(stored.data, background, stored.factor, room)
    # They name the image in vLLM's cache.
    config = {"background": background, "factor": stored.factor}
    return MediaWithBytes(image, stored.data, config), time.perf_counter() - begun
