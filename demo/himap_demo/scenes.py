# SPDX-License-Identifier: Apache-2.0
"""Pictures of simple objects on a 3 x 3 grid, each a function of its seed alone.

A scene is 168 x 168 pixels: a plain background with a slight gradient and noise, and one to six
objects, at most one per cell of 56 pixels. An object is one of eight shapes, or a card with a digit
on it, in one of eight colours; its size (radius 16 to 23 pixels) and its place within the cell
(3 pixels either way) vary. With the model's patches of 14 pixels a cell is 4 x 4 patches and an
object covers nine to sixteen of them.
"""

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 168
GRID = 3
CELL = SIZE // GRID
MAX_OBJECTS = 6

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (50, 200, 220),
    "pink": (250, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
CARD = "card"
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""Names of the cells in reading order."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `x`, `y`, `radius` are in pixels; `digit` is None unless a card."""

    color: str
    shape: str
    digit: int | None
    cell: int
    x: float
    y: float
    radius: float

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        x, y, r = self.x, self.y, self.radius
        return x - r, y - r, x + r, y + r


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `things` are in reading order."""

    seed: int
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    gradient: Point
    noise: float

    def at(self, row: int, column: int) -> Thing | None:
        """The object in a cell; None if the cell is empty or off the grid."""
        return next((t for t in self.things if (t.row, t.column) == (row, column)), None)


def make_scene(seed: int) -> Scene:
    """The scene of a seed (any non-negative integer)."""
    rng = random.Random(seed)
    things = []
    for cell in sorted(rng.sample(range(GRID * GRID), rng.randint(1, MAX_OBJECTS))):
        card = rng.random() < 0.25
        row, column = divmod(cell, GRID)
        things.append(
            Thing(
                color=rng.choice(list(COLORS)),
                shape=CARD if card else rng.choice(SHAPES),
                digit=rng.randint(0, 9) if card else None,
                cell=cell,
                x=(column + 0.5) * CELL + rng.uniform(-3, 3),
                y=(row + 0.5) * CELL + rng.uniform(-3, 3),
                radius=rng.uniform(16, 23),
            )
        )
    return Scene(
        seed=seed,
        things=tuple(things),
        background=(rng.randint(170, 250), rng.randint(170, 250), rng.randint(170, 250)),
        gradient=(rng.uniform(-30, 30), rng.uniform(-30, 30)),
        noise=rng.uniform(0, 10),
    )


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, SIZE x SIZE."""
    down, right = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    shade = scene.gradient[0] * down + scene.gradient[1] * right
    noise = np.random.default_rng(scene.seed).standard_normal((SIZE, SIZE), np.float32)
    pixels = np.array(scene.background, np.float32) + (shade + scene.noise * noise)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return image


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=30)


def _spikes(thing: Thing, count: int, inner: float | None = None) -> list[Point]:
    """Corners of a regular polygon, or of a star whose inner radius is a share of the outer one."""
    corners = count * 2 if inner else count
    points = []
    for i in range(corners):
        radius = thing.radius * (inner if inner and i % 2 else 1)
        angle = 2 * math.pi * i / corners
        points.append((thing.x + radius * math.sin(angle), thing.y - radius * math.cos(angle)))
    return points


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r = thing.x, thing.y, thing.radius
    color = COLORS[thing.color]
    match thing.shape:
        case "circle":
            canvas.ellipse(thing.box, fill=color)
        case "square":
            canvas.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=color)
        case "triangle":
            canvas.polygon(_spikes(thing, 3), fill=color)
        case "star":
            canvas.polygon(_spikes(thing, 5, 0.42), fill=color)
        case "cross":
            arm = r * 0.35
            canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=color)
            canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=color)
        case "diamond":
            canvas.polygon([(x, y - r), (x + r * 0.7, y), (x, y + r), (x - r * 0.7, y)], fill=color)
        case "ring":
            canvas.ellipse(thing.box, outline=color, width=round(r * 0.35))
        case "heart":
            canvas.ellipse((x - r, y - r * 0.9, x + r * 0.08, y + r * 0.2), fill=color)
            canvas.ellipse((x - r * 0.08, y - r * 0.9, x + r, y + r * 0.2), fill=color)
            tip = [(x - r * 0.93, y - r * 0.1), (x + r * 0.93, y - r * 0.1), (x, y + r)]
            canvas.polygon(tip, fill=color)
        case "card":
            canvas.rectangle(thing.box, fill=color, outline=(20, 20, 20), width=2)
            ink = (15, 15, 15) if sum(color) > 330 else (255, 255, 255)
            canvas.text((x, y), str(thing.digit), fill=ink, font=_font(), anchor="mm")
        case _:
            raise ValueError(f"no such shape: {thing.shape!r}")
