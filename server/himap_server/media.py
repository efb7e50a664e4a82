# SPDX-License-Identifier: Apache-2.0
"""Images and text of a request's body, before anything of vLLM sees them.

vLLM fetches any URL that it is given, takes media for what their keys say whatever their `type`,
and decodes by content whatever type is declared. So the body is gone through as plain JSON: every
image is fetched if need be, checked, and put back as a data URL; every other medium is refused; no
text may hold a token that stands for an image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from typing import Any

import vllm.multimodal.image as vllm_image
from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

from .errors import GatewayError
from .record import RequestRecord
from .security.fetch import ImageFetcher
from .security.images import (
    CheckedImage,
    ImageLimits,
    check_image,
    decode_data_url,
    to_data_url,
)

# Types of content parts, and keys by which vLLM knows a part without one; the Responses API's too.
_IMAGE = frozenset({"image_url", "input_image"})
_OTHER_MEDIA = (frozenset(MM_PARSER_MAP) | {"input_video", "input_file", "file", "file_id"}) - (
    TEXT_PART_TYPES | _IMAGE | {"tool_reference"}
)


def restrict_decoders() -> None:
    """Let vLLM decode what `check_image` has checked, as what it has checked it.

    vLLM seam (0.32): `open_image` hands this global to Pillow, which tries 37 formats in turn, so
    that a file that begins as a JPEG can be opened as a FLI of other dimensions. The four begin
    differently. Can go when vLLM has a setting for it.
    """
    vllm_image.ALLOWED_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


_MAY_HOLD_TEXT = (str, list, dict)

# Parameters of sampling, whose text never comes into a prompt.
_NO_PROMPT = frozenset({"stop", "bad_words"})

# vLLM's validation and chat templates take up to a millisecond for each, on the event loop.
_MAX_PARTS = 4096


class MediaCheck:
    """Goes through the bodies of requests, and replaces their images in place."""

    def __init__(
        self, limits: ImageLimits, max_images: int, max_bytes: int, fetcher: ImageFetcher | None
    ) -> None:
        """`max_bytes` is for all images of a request together, as pixels in `limits` are."""
        self._limits = limits
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._fetcher = fetcher
        self.placeholders: Collection[str] = ()
        """Tokens that stand for an image in a prompt; known when the model is loaded."""

    async def __call__(self, body: Any, record: RequestRecord) -> None:
        """Check a parsed body.

        Raises:
            GatewayError: something in it is refused.
        """
        parts = list(islice(_parts(body), _MAX_PARTS + 1))
        if len(parts) > _MAX_PARTS:
            raise GatewayError(
                400,
                f"more than {_MAX_PARTS} messages and content parts",
                reason="parts",
                param="messages" if "messages" in body else "input",
            )
        images = [(path, part) for path, part in parts if _is_image(path, part)]
        record.images = len(images)
        if len(images) > self._max_images:
            raise GatewayError(
                400,
                f"{len(images)} images; a request may have at most {self._max_images}",
                reason="image_count",
                param=images[self._max_images][0],
            )
        self._check_text(body, {id(part) for _, part in images})
        fetches = any(not _is_data_url(_url(part)) for _, part in images)
        begun = record.elapsed
        try:
            async with asyncio.TaskGroup() as group:
                budget = _Budget(self._limits.max_pixels, self._max_bytes)
                for path, part in images:
                    group.create_task(self._admit(path, part, budget))
        except* GatewayError as errors:
            raise errors.exceptions[0] from None
        finally:
            if fetches:
                record.fetching = record.elapsed - begun

    async def close(self) -> None:
        """Close the fetcher's connections."""
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _admit(self, path: str, part: dict[str, Any], budget: _Budget) -> None:
        url = _url(part)
        if not isinstance(url, str):
            raise GatewayError(400, "an image must have a URL", reason="image_url", param=path)
        if _is_data_url(url):
            # Off the event loop: megabytes take milliseconds.
            size, checked = await asyncio.to_thread(self._check_data_url, path, url)
            budget.take_bytes(size, path)
            budget.take_pixels(checked.pixels, path)
            url = f"data:image/{checked.kind};base64,{url.partition(',')[2]}"
        elif self._fetcher is None:
            raise GatewayError(
                400,
                "this server fetches no images: send a data URL, data:image/png;base64,...",
                reason="image_url",
                param=path,
            )
        else:
            data = await self._fetcher.fetch(url, path, partial(budget.take_bytes, param=path))
            checked = await asyncio.to_thread(check_image, data, self._limits, path)
            budget.take_pixels(checked.pixels, path)
            url = to_data_url(checked.kind, data)
        if part.get("type") == "input_image":
            part.setdefault("detail", "auto")  # OpenAI's default; vLLM (0.32) has none
        part["image_url"] = {"url": url} if isinstance(part["image_url"], dict) else url

    def _check_data_url(self, path: str, url: str) -> tuple[int, CheckedImage]:
        data = decode_data_url(url, self._limits, path)
        return len(data), check_image(data, self._limits, path)

    def _check_text(self, body: Any, images: Collection[int]) -> None:
        """vLLM (and CVE-2026-44222): the token of an image, typed, is taken for an image."""
        if not self.placeholders:
            return
        rest: list[tuple[Any, _Place | None]] = [(body, None)]
        while rest:
            node, place = rest.pop()
            if isinstance(node, str):
                for token in self.placeholders:
                    if token in node:
                        raise GatewayError(
                            400,
                            f"{token} stands for an image in this model's prompts and can't be "
                            "sent as text; send images as image_url parts",
                            reason="placeholder",
                            param=_path(place),
                        )
            elif isinstance(node, list):
                rest.extend(
                    (value, (place, index))
                    for index, value in enumerate(node)
                    if isinstance(value, _MAY_HOLD_TEXT)  # prompts come as token ids, too
                )
            elif isinstance(node, dict) and id(node) not in images:
                rest.extend((key, place) for key in node)
                rest.extend(
                    (value, (place, key))
                    for key, value in node.items()
                    if isinstance(value, _MAY_HOLD_TEXT)
                    and not (place is None and key in _NO_PROMPT)
                )


# Where a value stands in the body: linked, because a path for each would take as many characters
# as their keys have, times their number.
_Place = tuple[Any, str | int]


def _path(place: _Place | None) -> str:
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return "".join(reversed(steps)).lstrip(".")[:200]


class _Budget:
    """What the images of a request may still come to."""

    def __init__(self, pixels: int, size: int) -> None:
        self._limits = pixels, size
        self._pixels = self._size = 0

    def take_pixels(self, number: int, param: str) -> None:
        """Refuse (400) if the request has more now than it may have."""
        self._pixels += number
        self._check("pixels", self._pixels, self._limits[0], 400, param)

    def take_bytes(self, number: int, param: str) -> None:
        """Refuse (413) likewise; while they come in, for all images are fetched at once."""
        self._size += number
        self._check("bytes", self._size, self._limits[1], 413, param)

    def _check(self, what: str, spent: int, limit: int, status: int, param: str) -> None:
        if spent > limit:
            text = f"the images of this request have more than {limit} {what} together"
            raise GatewayError(status, text, reason=f"image_{what}", param=param)


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
            # An item can be a part itself.
            yield f"{field}[{index}]", item


def _is_image(path: str, part: dict[str, Any]) -> bool:
    names = set(part)
    if isinstance(part.get("type"), str) and part.get("uuid") is None:
        # vLLM goes by the type alone, and clients send the other fields as null.
        names = {name for name, value in part.items() if value is not None} | {part["type"]}
    if not _OTHER_MEDIA.isdisjoint(names):
        raise GatewayError(
            400,
            "media must be images: image_url parts (input_image in the Responses API) with a URL",
            reason="media",
            param=path,
        )
    if _IMAGE.isdisjoint(names):
        return False
    if part.get("uuid") is not None:
        # vLLM would look the image up by it, whoever sent that image.
        raise GatewayError(
            400, "uuid is not supported for images", reason="media", param=f"{path}.uuid"
        )
    return True


def _url(part: dict[str, Any]) -> Any:
    image = part.get("image_url")
    return image.get("url") if isinstance(image, dict) else image


def _is_data_url(url: Any) -> bool:
    return isinstance(url, str) and url[:5].lower() == "data:"
