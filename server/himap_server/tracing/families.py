# SPDX-License-Identifier: Apache-2.0
"""The layout of an image's tokens, for every family of `himap_vllm.model.families`.

Settings come from the loaded model's configuration and image processor; a processor or a setting
that is not known here has no layout, and its grids then have no place in the picture.

* `vllm.renderers.base.BaseRenderer.mm_processor` (read),
  `vllm.multimodal.processing.context.BaseProcessingInfo.get_hf_processor` (called): the processor
  with the operator's `--mm-processor-kwargs`. Remove when: vLLM tells where image tokens lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from .grids import AnyRes, ImageLayout, PixelSize, cropped, resized, tiled, unknown

_MAX_SIDE = 4096  # of Idefics3's processors
# What another configuration or processor than the family's usual one raises.
_OTHER = (AttributeError, KeyError, TypeError, ValueError)

Layouts = Callable[[PixelSize], Sequence[ImageLayout]]
"""The layouts that a picture of a size may have; its number of tokens tells which."""


class LayoutFinder:
    """Finds the layout of an image. One for each served model."""

    def __init__(self, architecture: str, config: Any, processor: Any) -> None:
        """
        Args:
            architecture: of the checkpoint.
            config: transformers' configuration of the model.
            processor: transformers' processor, with an `image_processor`.
        """
        self._layouts: Layouts | None = None
        with suppress(*_OTHER):
            self._layouts = _FAMILIES[architecture](config, processor)

    @classmethod
    def of_engine(cls, engine: Any, fixed: bool) -> LayoutFinder:
        """The finder of a loaded engine (`AsyncLLM`).

        Args:
            engine: it.
            fixed: no request can change the processor's settings.
        """
        config = engine.vllm_config.model_config
        processor = engine.renderer.mm_processor
        if processor is None or not fixed:
            return cls("", None, None)
        return cls(config.architecture, config.hf_config, processor.info.get_hf_processor())

    def find(self, size: PixelSize | None, num_tokens: int) -> ImageLayout:
        """The layout of an image.

        Args:
            size: of the picture that the processor got, in pixels; None if it is not known.
            num_tokens: of the image. A layout with another number is not the one that vLLM used.
        """
        if self._layouts is not None and size is not None:
            with suppress(*_OTHER):
                for layout in self._layouts(size):
                    if layout.num_tokens == num_tokens:
                        return layout
        return unknown(num_tokens)


def _llava(config: Any, processor: Any) -> Layouts:
    images, vision = processor.image_processor, config.vision_config
    if vision.model_type == "pixtral":
        return _pixtral(config, processor)
    patch = vision.patch_size

    def layouts(size: PixelSize) -> list[ImageLayout]:
        new = _new_size(images, size)
        crop = new
        if getattr(images, "do_center_crop", None):
            crop = _edges(images.crop_size, "width", "height")
        offset = [
            (was - now) // 2 if was >= now else -((now - was) // 2)
            for was, now in zip(new, crop, strict=True)
        ]
        cells = crop[0] // patch, crop[1] // patch
        layout = cropped(size, new, (offset[0], offset[1]), cells, (patch, patch))
        return [layout, layout.after(1)]  # with a class token (select strategy "full")

    return layouts


def _new_size(images: Any, size: PixelSize) -> PixelSize:
    if not images.do_resize:
        return size
    if (short := _edge(images.size, "shortest_edge")) is None:
        return _edges(images.size, "width", "height")
    if _edge(images.size, "longest_edge") is not None:
        raise ValueError("a size with two bounds is not known here")
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _pixtral(config: Any, processor: Any) -> Layouts:
    longest = _needed(processor.image_processor.size, "longest_edge")
    side = processor.patch_size * getattr(config, "spatial_merge_size", 1)

    def layouts(size: PixelSize) -> list[ImageLayout]:
        ratio = max(size) / longest
        new = size if ratio <= 1 else tuple(math.floor(edge / ratio) for edge in size)
        cells = (new[0] - 1) // side + 1, (new[1] - 1) // side + 1
        return [resized(size, cells, cells, (1, 1))]

    return layouts


def _any_res(config: Any, processor: Any) -> Layouts:
    images, vision = processor.image_processor, config.vision_config
    size = getattr(images, "crop_size", None) if _center_crops(images) else images.size
    tile = _edge(size, "height") or _edge(size, "shortest_edge")
    if tile is None or tile != vision.image_size:
        raise ValueError("the vision tower has another size")
    limit = getattr(config, "vision_aspect_ratio", "")  # LLaVA-OneVision's
    tiles = AnyRes(
        tile,
        vision.patch_size,
        int(limit.removeprefix("anyres_max_")) if limit.startswith("anyres_max_") else None,
    )
    canvases = [tuple(pinpoint) for pinpoint in config.image_grid_pinpoints]

    def layouts(size: PixelSize) -> list[ImageLayout]:
        height, width = select_best_resolution((size[1], size[0]), canvases)
        return [tiles.layout(size, (width, height))]

    return layouts


def _center_crops(images: Any) -> bool:
    return bool(getattr(images, "do_center_crop", False))


def _qwen(_config: Any, processor: Any) -> Layouts:
    images = processor.image_processor
    side = images.patch_size * images.merge_size
    low, high = _edges(images.size, "shortest_edge", "longest_edge")

    def layouts(size: PixelSize) -> list[ImageLayout]:
        height, width = smart_resize(size[1], size[0], side, low, high)
        cells = width // side, height // side
        return [resized(size, cells, cells, (1, 1))]

    return layouts


def _internvl(config: Any, processor: Any) -> Layouts:
    images = processor.image_processor
    side = math.isqrt(config.image_seq_length)
    tile = _edges(images.size, "height", "width")
    bounds = images.min_patches, images.max_patches

    def layouts(size: PixelSize) -> list[ImageLayout]:
        columns, rows = get_optimal_tiled_canvas((size[1], size[0]), tile, *bounds)
        return [tiled(size, tiles, (side, side)) for tiles in ((columns, rows), (1, 1))]

    return layouts


def _idefics3(config: Any, processor: Any) -> Layouts:
    images = processor.image_processor
    longest = _needed(images.size, "longest_edge")
    tile = _needed(images.max_image_size, "longest_edge")
    side = tile // config.vision_config.patch_size // config.scale_factor

    def layouts(size: PixelSize) -> list[ImageLayout]:
        tiles = _idefics3_tiles(size, longest, tile)
        return [tiled(size, number, (side, side)) for number in (tiles, (1, 1))]

    return layouts


def _idefics3_tiles(size: PixelSize, longest: int, tile: int) -> PixelSize:
    """Columns and rows of tiles. The picture is resized twice, and each time sides are rounded."""
    if size[0] < size[1]:
        rows, columns = _idefics3_tiles((size[1], size[0]), longest, tile)
        return columns, rows
    width, height = longest, int(longest / (size[0] / size[1]))
    height = max(height + height % 2, 1)
    if width > _MAX_SIDE:
        width, height = _MAX_SIDE, max(int(_MAX_SIDE / (width / height)), 1)
    columns = math.ceil(width / tile)
    return columns, math.ceil(int(columns * tile / (width / height)) / tile)


def _edge(size: Any, name: str) -> int | None:
    found = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return None if found is None else int(found)


def _needed(size: Any, name: str) -> int:
    edge = _edge(size, name)
    if edge is None:
        raise ValueError(f"the processor has no {name}")
    return edge


def _edges(size: Any, first: str, second: str) -> PixelSize:
    return _needed(size, first), _needed(size, second)


_FAMILIES: dict[str, Callable[[Any, Any], Layouts]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _any_res,
    "LlavaOnevisionForConditionalGeneration": _any_res,
    "Qwen2VLForConditionalGeneration": _qwen,
    "Qwen2_5_VLForConditionalGeneration": _qwen,
    "Qwen3VLForConditionalGeneration": _qwen,
    "Mistral3ForConditionalGeneration": _pixtral,
    "InternVLForConditionalGeneration": _internvl,
    "Idefics3ForConditionalGeneration": _idefics3,
    "SmolVLMForConditionalGeneration": _idefics3,
}
