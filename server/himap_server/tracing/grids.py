# SPDX-License-Identifier: Apache-2.0
"""Where image tokens lie in a picture: grids of cells. Arithmetic only.

A grid is a rectangle of the model's patches with one token each. Processors resize, crop, pad and
tile a picture; a grid undoes that, and says where its cells lie in the picture that was sent.
Sizes are (width, height) in pixels, unless they are called `rows` and `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

GridKind = Literal["whole", "tile", "thumbnail"]
Size = tuple[float, float]
PixelSize = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """Place of a grid in the picture, in its pixels.

    The cell in row r and column c begins at (`left` + c * `cell_width`, `top` + r * `cell_height`).
    Cells may lie partly outside the picture, where the processor has padded it.
    """

    left: float
    top: float
    cell_width: float
    cell_height: float

    def scaled(self, factor: float) -> Box:
        """The same in a picture that is `factor` times as large."""
        edges = (self.left, self.top, self.cell_width, self.cell_height)
        return Box(*(factor * edge for edge in edges))


@dataclass(frozen=True, slots=True)
class Grid:
    """Tokens of an image that form a grid.

    Attributes:
        kind: of the whole picture, of one of its tiles, or of the picture in small beside its
            tiles.
        rows, columns: cells.
        first: index, among the image's tokens, of the cell in row 0 and column 0.
        stride: tokens from the beginning of a row to that of the next.
        box: where it lies; None if that is not known.
    """

    kind: GridKind
    rows: int
    columns: int
    first: int
    stride: int
    box: Box | None

    def row_tokens(self) -> Iterator[range]:
        """For each row, the indices of its tokens."""
        for row in range(self.rows):
            start = self.first + row * self.stride
            yield range(start, start + self.columns)


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """All tokens of an image.

    Attributes:
        grids: in the order of their tokens.
        num_tokens: those in no grid (line breaks, a class token) included.
    """

    grids: tuple[Grid, ...]
    num_tokens: int

    def scaled(self, factor: float) -> ImageLayout:
        """The same in a picture that is `factor` times as large."""
        grids = (replace(grid, box=grid.box and grid.box.scaled(factor)) for grid in self.grids)
        return replace(self, grids=tuple(grids))

    def after(self, num_tokens: int) -> ImageLayout:
        """The same behind tokens that are in no grid."""
        grids = (replace(grid, first=grid.first + num_tokens) for grid in self.grids)
        return ImageLayout(tuple(grids), self.num_tokens + num_tokens)


def unknown(num_tokens: int) -> ImageLayout:
    """The layout of an image of which no more is known than its tokens: one row, nowhere."""
    return ImageLayout((Grid("whole", 1, num_tokens, 0, num_tokens, None),), num_tokens)


def resized(picture: PixelSize, new: Size, cells: PixelSize, cell: Size) -> ImageLayout:
    """A picture that is resized as a whole.

    Args:
        picture: its size.
        new: size that it is resized to.
        cells: columns and rows.
        cell: size of a cell, in the resized picture. Cells need not cover all of it: a vision tower
            leaves out what is less than a patch.
    """
    return cropped(picture, new, (0, 0), cells, cell)


def cropped(
    picture: PixelSize, new: Size, offset: Size, cells: PixelSize, cell: Size
) -> ImageLayout:
    """A picture that is resized, then cropped; `offset` is the crop's place, below 0 if padded."""
    columns, rows = cells
    box = _box(picture, new, offset, cell)
    return ImageLayout((Grid("whole", rows, columns, 0, columns, box),), rows * columns)


def tiled(picture: PixelSize, tiles: PixelSize, side: PixelSize) -> ImageLayout:
    """A picture that is stretched over tiles, which follow each other, then a thumbnail of it.

    Args:
        picture: its size.
        tiles: columns and rows of tiles. A single tile is the whole picture, without a thumbnail.
        side: columns and rows of cells in each tile.
    """
    columns, rows = side
    count = columns * rows
    if tiles == (1, 1):
        return resized(picture, side, side, (1, 1))
    all_cells = tiles[0] * columns, tiles[1] * rows
    grids = []
    for index in range(tiles[0] * tiles[1]):
        down, right = divmod(index, tiles[0])
        box = _box(picture, all_cells, (right * columns, down * rows), (1, 1))
        grids.append(Grid("tile", rows, columns, index * count, columns, box))
    small = _box(picture, side, (0, 0), (1, 1))
    grids.append(Grid("thumbnail", rows, columns, len(grids) * count, columns, small))
    return ImageLayout(tuple(grids), len(grids) * count)


@dataclass(frozen=True, slots=True)
class AnyRes:
    """How LLaVA-NeXT tiles a picture: a thumbnail, then the tiles' rows, each with a line break.

    Attributes:
        tile: width and height of a tile in pixels; a thumbnail has them, too.
        patch: side of a patch in pixels.
        max_tiles: tiles whose tokens a picture may have; with more, their grid is made coarser.
    """

    tile: int
    patch: int
    max_tiles: int | None = None

    def layout(self, picture: PixelSize, canvas: PixelSize) -> ImageLayout:
        """The layout of a picture that is fitted into `canvas`, and padded on both sides alike."""
        side = self.tile // self.patch
        thumbnail = _box(picture, (self.tile, self.tile), (0, 0), (self.patch, self.patch))
        grids = [Grid("thumbnail", side, side, 0, side, thumbnail)]
        new = _fitted(picture, canvas)
        offset = -((canvas[0] - new[0]) // 2), -((canvas[1] - new[1]) // 2)
        cells = canvas[0] // self.tile * side, canvas[1] // self.tile * side
        skipped = _padding_cells(picture, cells)
        left = cells[0] - 2 * skipped[0], cells[1] - 2 * skipped[1]
        coarse = self._coarser(left, side)
        if coarse is not None:
            # Cells are blended, over the borders of tiles: as if patches filled the tiles.
            pixels = self.tile / side
            cell = pixels * left[0] / coarse[0], pixels * left[1] / coarse[1]
            begin = skipped[0] * pixels + offset[0], skipped[1] * pixels + offset[1]
            box = _box(picture, new, begin, cell)
            grids.append(Grid("tile", coarse[1], coarse[0], side**2, coarse[0] + 1, box))
            return ImageLayout(tuple(grids), side**2 + coarse[1] * (coarse[0] + 1))
        for down, (top, bottom) in _parts(skipped[1], left[1], side):
            for right, (start, end) in _parts(skipped[0], left[0], side):
                begin = (
                    right * self.tile + (start - right * side) * self.patch + offset[0],
                    down * self.tile + (top - down * side) * self.patch + offset[1],
                )
                box = _box(picture, new, begin, (self.patch, self.patch))
                first = side**2 + (top - skipped[1]) * (left[0] + 1) + start - skipped[0]
                grids.append(Grid("tile", bottom - top, end - start, first, left[0] + 1, box))
        return ImageLayout(tuple(grids), side**2 + left[1] * (left[0] + 1))

    def _coarser(self, cells: PixelSize, side: int) -> PixelSize | None:
        if self.max_tiles is None:
            return None
        ratio = (cells[0] * cells[1] / (self.max_tiles * side**2)) ** 0.5
        return (int(cells[0] // ratio), int(cells[1] // ratio)) if ratio > 1.1 else None


def _box(picture: PixelSize, new: Size, offset: Size, cell: Size) -> Box:
    x, y = picture[0] / new[0], picture[1] / new[1]
    return Box(offset[0] * x, offset[1] * y, cell[0] * x, cell[1] * y)


def _fitted(picture: PixelSize, canvas: PixelSize) -> PixelSize:
    """Size of the picture once it is scaled into the canvas, as transformers rounds it."""
    (width, height), (right, bottom) = picture, canvas
    if right / width < bottom / height:
        return right, min(-(-height * right // width), bottom)
    return min(-(-width * bottom // height), right), bottom


def _padding_cells(picture: PixelSize, cells: PixelSize) -> PixelSize:
    """Columns at the left, and rows at the top, of only padding; as many are at the other end."""
    (width, height), (columns, rows) = picture, cells
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0


def _parts(skipped: int, count: int, side: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """The tiles that `count` cells behind `skipped` lie in, and their first and last cell there."""
    for tile in range(skipped // side, -(-(skipped + count) // side)):
        yield tile, (max(skipped, tile * side), min(skipped + count, (tile + 1) * side))
