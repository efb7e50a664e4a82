# SPDX-License-Identifier: Apache-2.0
"""Where image tokens lie in a picture, for every family: held to transformers, without an engine.

Two ways. A patch is marked, and the token of the real vision tower (random weights) that changes
most must be that of the marked cell. And a picture in which the colour of a pixel tells its place
goes through the real image processor: the mean colour of a patch tells where its cell has its
middle, to the pixel.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from himap_server.tracing.families import LayoutFinder
from himap_server.tracing.grids import AnyRes, Grid, unknown
from PIL import Image, ImageDraw
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from himap_vllm.model.families import FAMILIES
from tests.checkpoints import build_llava
from tests.families import TINY

SIZES = ((112, 112), (60, 120), (150, 70), (57, 56), (223, 97), (40, 200), (190, 250))
"""(width, height) of pictures."""

_ATTENTION_OUT = ("out_proj.weight", "attn.proj.weight", "projection_layer.weight", "o_proj.weight")


class Checkpoint:
    """A tiny checkpoint in transformers, and the finder of its layouts."""

    def __init__(self, path: Path, image: str) -> None:
        self._image = image
        self.config = AutoConfig.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if name.endswith(_ATTENTION_OUT) and "language_model" not in name:
                weight.data.zero_()  # else a mark changes all tokens, whose weights are random
        self._features = model.eval().model.get_image_features
        self.architecture = self.config.architectures[0]
        self.finder = LayoutFinder(self.architecture, self.config, self.processor)

    @property
    def breaks_lines(self) -> bool:
        """Whether a token stands behind each row of the tiles."""
        return "LlavaNext" in self.architecture or "Onevision" in self.architecture

    def pixels(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What the processor makes of a picture."""
        inputs: Any = self.processor(text=self._image, images=[picture], return_tensors="pt")
        names = inspect.signature(self._features).parameters
        return {name: inputs[name] for name in names if name in inputs}

    @torch.inference_mode()
    def tokens(self, picture: Image.Image) -> torch.Tensor:
        """[num tokens, hidden size] as the decoder gets them."""
        found: Any = self._features(**self.pixels(picture))
        found = getattr(found, "pooler_output", found)
        parts = found if isinstance(found, list | tuple) else [found]
        return torch.cat([part.flatten(0, -2) for part in parts])

    def colours(self, picture: Image.Image) -> torch.Tensor:
        """[num tokens, 2] mean red and green, in [0, 1], of the pixels behind each token."""
        values = self.pixels(picture)["pixel_values"]
        if "Qwen" in self.architecture:  # [patches, pixels], four to a token
            means = values.reshape(len(values) // 4, 4, 3, -1)[:, :, :2].mean((1, 3))
            return means * 0.5 + 0.5
        tiles = values.reshape(-1, *values.shape[-3:])
        means = torch.nn.functional.avg_pool2d(tiles[:, :2], self._cell()) * 0.5 + 0.5
        if not self.breaks_lines:
            return means.permute(0, 2, 3, 1).flatten(0, 2)
        small, side = means[0].flatten(1), means.shape[-1]
        size = picture.height, picture.width
        canvas = select_best_resolution(size, self.config.image_grid_pinpoints)
        rows, columns = (edge // tiles.shape[-1] for edge in canvas)
        mosaic = means[1 : 1 + rows * columns].reshape(rows, columns, 2, side, side)
        mosaic = mosaic.permute(2, 0, 3, 1, 4).reshape(2, rows * side, columns * side)
        left = torch.nn.functional.pad(unpad_image(mosaic, size), (0, 1), value=torch.nan)
        return torch.cat((small, left.flatten(1)), dim=1).T

    def _cell(self) -> int:
        """Side of a token's cell in the processor's pixels."""
        patch = self.config.vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        merges = ("InternVL", "Idefics3", "SmolVLM", "Mistral3")
        return 2 * int(patch) if self.architecture.startswith(merges) else int(patch)


@pytest.fixture(scope="module", params=["llava", *TINY])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    path, image = tmp_path_factory.mktemp(request.param), "<image>"
    if request.param == "llava":
        build_llava(path, num_layers=1)
    else:
        TINY[request.param].build(path)
        image = TINY[request.param].image
    return Checkpoint(path, image)


def cells(grid: Grid) -> Iterator[tuple[int, int, int]]:
    """Row, column and token of each cell."""
    for row, tokens in enumerate(grid.row_tokens()):
        for column, token in enumerate(tokens):
            yield row, column, token


def edges(grid: Grid, row: int, column: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a cell in the picture."""
    box = grid.box
    assert box is not None
    left, top = box.left + column * box.cell_width, box.top + row * box.cell_height
    return left, top, left + box.cell_width, top + box.cell_height


def marked(picture: Image.Image, cell: tuple[float, float, float, float]) -> Image.Image | None:
    """The picture with the inner part of a cell red; None: part of it lies outside."""
    left, top, right, bottom = cell
    x, y = 0.2 * (right - left), 0.2 * (bottom - top)
    box = round(left + x), round(top + y), round(right - x) - 1, round(bottom - y) - 1
    if min(box) < 0 or box[2] >= picture.width or box[3] >= picture.height:
        return None
    other = picture.copy()
    ImageDraw.Draw(other).rectangle((*box[:2], max(box[0], box[2]), max(box[1], box[3])), "red")
    return other


def test_a_marked_patch_is_found(checkpoint: Checkpoint) -> None:
    seen = 0
    for size in SIZES:
        picture = Image.new("RGB", size, (90, 140, 120))
        plain = checkpoint.tokens(picture)
        for grid in checkpoint.finder.find(size, len(plain)).grids:
            own = [token for _, _, token in cells(grid)]
            for row, column, token in list(cells(grid))[:: max(1, len(own) // 7)]:
                other = marked(picture, edges(grid, row, column))
                if other is None:
                    continue
                change = (checkpoint.tokens(other) - plain).norm(dim=-1)
                assert own[int(change[own].argmax())] == token, (size, grid, row, column)
                seen += 1
    assert seen > 40


def test_cells_lie_where_their_pixels_come_from(checkpoint: Checkpoint) -> None:
    checked = 0
    for size in SIZES:
        width, height = size
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
        pixels[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
        colours = checkpoint.colours(Image.fromarray(pixels)) * torch.tensor(size)
        layout = checkpoint.finder.find(size, len(colours))
        in_grids = set()
        for grid in layout.grids:
            for row, column, token in cells(grid):
                assert token not in in_grids
                in_grids.add(token)
                left, top, right, bottom = edges(grid, row, column)
                if left > -1 and top > -1 and right < width + 1 and bottom < height + 1:
                    middle = (left + right) / 2, (top + bottom) / 2
                    assert colours[token].tolist() == pytest.approx(middle, abs=1), (size, grid)
                    checked += 1
        breaks = set(colours[:, 0].isnan().nonzero().flatten().tolist())
        assert in_grids | breaks == set(range(len(colours)))
        assert not in_grids & breaks
    assert checked > 60


def test_all_families_are_here(tmp_path: Path) -> None:
    found = {"LlavaForConditionalGeneration"}
    for name, tiny in TINY.items():
        (tmp_path / name).mkdir()
        tiny.build(tmp_path / name)
        found.add(AutoConfig.from_pretrained(tmp_path / name).architectures[0])
    assert found == set(FAMILIES)


class Config:
    """What the finder reads of LLaVA-1.5's configuration."""

    class vision_config:  # noqa: N801
        model_type = "clip_vision_model"
        patch_size = 14


class Processor:
    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


def llava(image_processor: Any) -> LayoutFinder:
    return LayoutFinder("LlavaForConditionalGeneration", Config, Processor(image_processor))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        # 336 of the shortest edge, the middle of the longest: 640 x 480 becomes 448 x 336.
        ((640, 480), (56 * 480 / 336, 0)),
        ((480, 640), (0, 56 * 480 / 336)),
        ((336, 336), (0, 0)),
    ],
)
def test_a_cropped_picture(size: tuple[int, int], box: tuple[float, float]) -> None:
    side = {"height": 336, "width": 336}
    finder = llava(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side))
    (grid,) = finder.find(size, 576).grids
    assert edges(grid, 0, 0)[:2] == pytest.approx(box)
    assert edges(grid, 23, 23)[2:] == pytest.approx((size[0] - box[0], size[1] - box[1]))
    (with_class_token,) = finder.find(size, 577).grids
    assert (with_class_token.first, with_class_token.box) == (1, grid.box)


def test_what_is_less_than_a_patch_is_not_seen() -> None:
    finder = llava(SiglipImageProcessor(size={"height": 384, "width": 384}))
    (grid,) = finder.find((768, 384), 27 * 27).grids
    assert edges(grid, 26, 26)[2:] == pytest.approx((2 * 378, 378))


def test_a_coarser_grid_covers_the_picture() -> None:
    layout = AnyRes(tile=384, patch=14, max_tiles=9).layout((2304, 1152), (2304, 2304))
    tiles = layout.grids[1]
    assert tiles.rows * tiles.columns <= 9 * 27**2
    assert edges(tiles, 0, 0)[:2] == pytest.approx((0, 0), abs=15)
    end = edges(tiles, tiles.rows - 1, tiles.columns - 1)
    assert end[2:] == pytest.approx((2304, 1152), abs=15)
    assert layout.num_tokens == 27**2 + tiles.rows * (tiles.columns + 1)


def test_what_is_not_known_has_no_place() -> None:
    clip = llava(CLIPImageProcessor(size={"shortest_edge": 336}))
    assert clip.find((640, 480), 575) == unknown(575)  # another number of tokens
    assert clip.find(None, 576) == unknown(576)
    assert LayoutFinder("Unheard", Config, None).find((64, 64), 9).grids[0].box is None
    assert llava(None).find((64, 64), 9) == unknown(9)
