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
from typing import Any

import vllm.multimodal.image as vllm_image
from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

from .errors import GatewayError
from .record import RequestRecord
from .security.fetch import ImageFetcher
from .security.images import ImageLimits, check_image, decode_data_url, to_data_url

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


class MediaCheck:
    """Goes through the bodies of requests, and replaces their images in place."""

    def __init__(self, limits: ImageLimits, max_images: int, fetcher: ImageFetcher | None) -> None:
        self._limits = limits
        self._max_images = max_images
        self._fetcher = fetcher
        self.placeholders: Collection[str] = ()
        """Tokens that stand for an image in a prompt; known when the model is loaded."""

    async def __call__(self, body: Any, record: RequestRecord) -> None:
        """Check a parsed body.

        Raises:
            GatewayError: something in it is refused.
        """
        images = [(path, part) for path, part in _parts(body) if _is_image(path, part)]
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
                for path, part in images:
                    group.create_task(self._admit(path, part))
        except* GatewayError as errors:
            raise _first(errors) from None
        finally:
            if fetches:
                record.fetching = record.elapsed - begun

    async def close(self) -> None:
        """Close the fetcher's connections."""
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _admit(self, path: str, part: dict[str, Any]) -> None:
        url = _url(part)
        if not isinstance(url, str):
            raise GatewayError(400, "an image must have a URL", reason="image_url", param=path)
        if _is_data_url(url):
            # Off the event loop: megabytes take milliseconds.
            url = await asyncio.to_thread(self._check_data_url, path, url)
        elif self._fetcher is None:
            raise GatewayError(
                400,
                "this server fetches no images: send a data URL, data:image/png;base64,...",
                reason="image_url",
                param=path,
            )
        else:
            data = await self._fetcher.fetch(url, path)
            kind = await asyncio.to_thread(check_image, data, self._limits, path)
            url = to_data_url(kind, data)
        part["image_url"] = {"url": url} if isinstance(part["image_url"], dict) else url

    def _check_data_url(self, path: str, url: str) -> str:
        _, data = decode_data_url(url, self._limits, path)
        kind = check_image(data, self._limits, path)
        return f"data:image/{kind};base64,{url.partition(',')[2]}"

    def _check_text(self, body: Any, images: Collection[int]) -> None:
        """vLLM (and CVE-2026-44222): the token of an image, typed, is taken for an image."""
        rest: list[tuple[str, Any]] = [("", body)]
        while rest:
            path, node = rest.pop()
            if isinstance(node, str):
                for token in self.placeholders:
                    if token in node:
                        raise GatewayError(
                            400,
                            f"{token} stands for an image in this model's prompts and can't be "
                            "sent as text; send images as image_url parts",
                            reason="placeholder",
                            param=path.lstrip("."),
                        )
            elif isinstance(node, list):
                rest.extend((f"{path}[{index}]", value) for index, value in enumerate(node))
            elif isinstance(node, dict) and id(node) not in images:
                rest.extend((f"{path}.{key}", value) for key, value in node.items())
                rest.extend((path, key) for key in node)


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
    names = {*part, part["type"]} if isinstance(part.get("type"), str) else set(part)
    if not _OTHER_MEDIA.isdisjoint(names):
        raise GatewayError(
            400,
            "media must be images: image_url parts (input_image in the Responses API) with a URL",
            reason="media",
            param=path,
        )
    if _IMAGE.isdisjoint(names):
        return False
    if "uuid" in part:
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


def _first(errors: BaseExceptionGroup[GatewayError]) -> GatewayError:
    error = errors.exceptions[0]
    return error if isinstance(error, GatewayError) else _first(error)
