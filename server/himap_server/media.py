# SPDX-License-Identifier: Apache-2.0
"""Images and text of a request's body, before anything of vLLM sees them.

vLLM fetches any URL that it is given, takes media for what their keys say whatever their `type`,
and decodes by content whatever type is declared. So the gateway walks the body as plain JSON. It
fetches images that come as URLs, checks every image, and keeps it in a store, from which vLLM takes
it (checked_images.py). It refuses every other medium, and text with a token that stands for an
image.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from himap_vllm.vllm_versions import MM_PARSER_MAP, TEXT_PART_TYPES

from .checked_images import ImageStore
from .errors import GatewayError, Reason
from .named_images import NamedImages, name_of
from .offload import off_the_loop
from .places import Place, path_of
from .record import DETAILS, Detail, RequestRecord
from .reduction import Reduction
from .security.fetch import ImageFetcher
from .security.images import CheckedImage, ImageLimits, check_image, decode_data_url

# Types of content parts, and keys by which vLLM knows a part without one; the Responses API's too.
_IMAGE = frozenset({"image_url", "input_image"})
_OTHER_MEDIA = (frozenset(MM_PARSER_MAP) | {"input_video", "input_file", "file", "file_id"}) - (
    TEXT_PART_TYPES | _IMAGE | {"tool_reference"}
)

_MAY_HOLD_TEXT = (str, list, dict)

# Sampling parameters: their text never becomes part of a prompt.
_NO_PROMPT = frozenset({"stop", "bad_words"})

# vLLM's validation and chat templates take up to a millisecond for each, on the event loop.
_MAX_PARTS = 4096
_LISTS = ("messages", "input", "tools")


class MediaCheck:
    """Walks the bodies of requests, and replaces their images in place."""

    def __init__(
        self,
        store: ImageStore,
        limits: ImageLimits,
        max_images: int,
        max_pixels: int,
        max_bytes: int,
        fetcher: ImageFetcher | None,
        max_named_bytes: int = 0,
    ) -> None:
        """`max_pixels` and `max_bytes` are for all images of a request together.

        `max_named_bytes` are for images that clients name, of all requests.
        """
        self._store = store
        self._limits = limits
        self._max_images = max_images
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._fetcher = fetcher
        self._named = NamedImages(max_named_bytes)
        self.reduction = Reduction()
        """What the model's processor makes of large images; known when the model is loaded."""
        self.placeholders: Collection[str] = ()
        """Tokens that stand for an image in a prompt; known when the model is loaded."""

    @asynccontextmanager
    async def admit(self, body: Any, record: RequestRecord) -> AsyncIterator[None]:
        """Check a parsed body; its images stay in the store as long as the context is open.

        Raises:
            GatewayError: something in the body is refused.
        """
        try:
            await self._check(body, record)
            yield
        finally:
            self._store.remove(filter(None, record.urls))

    async def _check(self, body: Any, record: RequestRecord) -> None:
        _check_number(body)
        parts = list(_parts(body))
        images = [(path, part) for path, part in parts if _is_image(path, part)]
        record.images = len(images)
        if len(images) > self._max_images:
            raise GatewayError(
                400,
                f"{len(images)} images; a request may have at most {self._max_images}",
                reason=Reason.IMAGE_COUNT,
                param=images[self._max_images][0],
            )
        record.details = [_detail(path, part) for path, part in images]
        names = [name_of(part, path) for path, part in images]
        record.urls = [""] * len(images)
        self._check_text(body, {id(part) for _, part in images})
        budget = _Budget(self._max_pixels, self._max_bytes)
        urls = [_url(part) for _, part in images]
        fetches = any(url and not _is_data_url(url) for url in urls)
        sent: list[CheckedImage | None] = [None] * len(images)
        begun = record.elapsed
        try:
            async with asyncio.TaskGroup() as group:
                for index, (path, part) in enumerate(images):
                    if names[index] is None or urls[index]:
                        group.create_task(self._get(path, part, budget, sent, index))
        except* GatewayError as errors:
            raise errors.exceptions[0] from None
        finally:
            if fetches:
                record.fetching = record.elapsed - begun
        # Of a conversation, later parts may name what earlier ones brought.
        for index, (path, part) in enumerate(images):
            name, image = names[index], sent[index]
            if image is None:
                image = self._named.find(record.key, str(name), path)
                budget.take_bytes(len(image.data), path)
            elif name is not None:
                self._named.remember(record.key, name, image)
            record.urls[index] = self._keep(path, part, image, budget)

    async def close(self) -> None:
        """Close the fetcher's connections."""
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _get(
        self,
        path: str,
        part: dict[str, Any],
        budget: _Budget,
        sent: list[CheckedImage | None],
        index: int,
    ) -> None:
        """Get the image of a part's URL, and check it."""
        url = _url(part)
        if not isinstance(url, str):
            raise GatewayError(400, "an image must have a URL", reason=Reason.IMAGE_URL, param=path)
        # Decoding and checking megabytes takes milliseconds: not on the event loop.
        if _is_data_url(url):
            data = await off_the_loop(decode_data_url, url, self._limits, path)
            budget.take_bytes(len(data), path)
        elif self._fetcher is None:
            raise GatewayError(
                400,
                "this server fetches no images: send a data URL, data:image/png;base64,...",
                reason=Reason.IMAGE_URL,
                param=path,
            )
        else:
            data = await self._fetcher.fetch(url, path, partial(budget.take_bytes, param=path))
        sent[index] = await off_the_loop(check_image, data, self._limits, path)

    def _keep(self, path: str, part: dict[str, Any], image: CheckedImage, budget: _Budget) -> str:
        """Put an image into the store, and its URL there in the place of the client's."""
        factor = self.reduction.factor(image.width, image.height)
        budget.take_pixels(image.width * image.height // factor**2, path)
        stored = self._store.add(image.data, factor)
        kind = part.get("type")
        part.pop("uuid", None)  # vLLM would look for the image under it
        part.pop("detail", None)  # vLLM would warn that it makes nothing of it
        if kind == "input_image":
            part["detail"] = "auto"  # OpenAI's default; vLLM (0.32) has none
        # Clients send a string for an object, and an object for a string.
        as_object = kind == "image_url" or (
            kind != "input_image" and isinstance(part.get("image_url"), dict)
        )
        part["image_url"] = {"url": stored} if as_object else stored
        return stored

    def _check_text(self, body: Any, images: Collection[int]) -> None:
        """Refuse typed image tokens: vLLM takes them for images (CVE-2026-44222)."""
        if not self.placeholders:
            return
        rest: list[tuple[Any, Place | None]] = [(body, None)]
        while rest:
            node, place = rest.pop()
            if isinstance(node, str):
                for token in self.placeholders:
                    if token in node:
                        raise GatewayError(
                            400,
                            f"{token} stands for an image in this model's prompts and can't be "
                            "sent as text; send images as image_url parts",
                            reason=Reason.PLACEHOLDER,
                            param=path_of(place),
                        )
            elif isinstance(node, list):
                rest.extend(
                    (value, (place, index))
                    for index, value in enumerate(node)
                    if isinstance(value, _MAY_HOLD_TEXT)  # not the token ids of a prompt
                )
            elif isinstance(node, dict) and id(node) not in images:
                rest.extend((key, place) for key in node)
                rest.extend(
                    (value, (place, key))
                    for key, value in node.items()
                    if isinstance(value, _MAY_HOLD_TEXT)
                    and not (place is None and key in _NO_PROMPT)
                )


class _Budget:
    """Counts bytes, and pixels that are kept, of all images of a request together."""

    def __init__(self, max_pixels: int, max_bytes: int) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._pixels = self._bytes = 0

    def take_pixels(self, number: int, param: str) -> None:
        """Count pixels. Raises a GatewayError (400) if there are too many."""
        self._pixels += number
        if self._pixels > self._max_pixels:
            raise self._refusal(400, Reason.IMAGE_PIXELS, f"{self._max_pixels} pixels", param)

    def take_bytes(self, number: int, param: str) -> None:
        """Count bytes as they come. Raises a GatewayError (413) if there are too many."""
        self._bytes += number
        if self._bytes > self._max_bytes:
            raise self._refusal(413, Reason.IMAGE_BYTES, f"{self._max_bytes} bytes", param)

    def _refusal(self, status: int, reason: Reason, limit: str, param: str) -> GatewayError:
        text = f"the images of this request have more than {limit} together"
        return GatewayError(status, text, reason=reason, param=param)


def _check_number(body: Any) -> None:
    """Raise a GatewayError for too many messages, content parts, tools and calls of any type."""
    number = 0
    for field in _LISTS:
        items = body.get(field) if isinstance(body, dict) else None
        for item in items if isinstance(items, list) else ():
            number += 1
            if isinstance(item, dict):
                number += sum(len(value) for value in item.values() if isinstance(value, list))
            if number > _MAX_PARTS:
                text = f"more than {_MAX_PARTS} messages, content parts and tools"
                raise GatewayError(400, text, reason=Reason.PARTS, param=field)


def _parts(body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Content parts of chat messages, and of items of the Responses API."""
    for field in ("messages", "input"):
        items = body.get(field) if isinstance(body, dict) else None
        for index, item in enumerate(items if isinstance(items, list) else ()):
            if not isinstance(item, dict):
                continue
            # Results of tools come as `output`.
            for key in ("content", "output"):
                parts = item.get(key)
                if isinstance(parts, dict):
                    yield f"{field}[{index}].{key}", parts
                for number, part in enumerate(parts if isinstance(parts, list) else ()):
                    if isinstance(part, dict):
                        yield f"{field}[{index}].{key}[{number}]", part
            for key in ("reasoning", "reasoning_content"):  # can be a part from vLLM 0.33 on
                if isinstance(item.get(key), dict):
                    yield f"{field}[{index}].{key}", item[key]
            # An item can be a part itself.
            yield f"{field}[{index}]", item


def _is_image(path: str, part: dict[str, Any]) -> bool:
    names = set(part)
    if isinstance(part.get("type"), str):
        if part.get("uuid") is None or part["type"] in _IMAGE:
            # vLLM goes by the type alone, and clients send the other fields as null.
            names = {name for name, value in part.items() if value is not None}
        names.add(part["type"])
    if not _OTHER_MEDIA.isdisjoint(names):
        raise GatewayError(
            400,
            "media must be images: image_url parts (input_image in the Responses API) with a URL",
            reason=Reason.MEDIA,
            param=path,
        )
    if _IMAGE.isdisjoint(names):
        return False
    kind = part.get("type", "message" if "role" in part else None)
    if isinstance(kind, str) and kind not in _IMAGE:
        # vLLM would leave the image out, and the details of the others would move up.
        raise GatewayError(
            400,
            f"a part of type {kind} can't have an image: its type must be image_url (input_image "
            "in the Responses API)",
            reason=Reason.MEDIA,
            param=path,
        )
    return True


def _detail(path: str, part: dict[str, Any]) -> Detail:
    """How carefully the model is to look at an image; `auto` if the client does not say.

    Raises:
        GatewayError: HTTP 400.
    """
    image = part.get("image_url")
    if isinstance(image, dict) and image.get("detail") is not None:
        path, part = f"{path}.image_url", image
    detail = part.get("detail")
    if detail is None:
        return "auto"
    if detail not in DETAILS:
        *others, last = DETAILS
        raise GatewayError(
            400,
            f"{path}.detail must be {', '.join(others)} or {last}",
            reason=Reason.INVALID,
            param=f"{path}.detail",
        )
    found: Detail = detail
    return found


def _url(part: dict[str, Any]) -> Any:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return url.strip() if isinstance(url, str) else url


def _is_data_url(url: Any) -> bool:
    return isinstance(url, str) and url[:5].lower() == "data:"
