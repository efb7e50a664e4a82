# SPDX-License-Identifier: Apache-2.0
"""Pictures of simple objects, each a function of its seed alone.

A scene is 252 x 252 pixels: a plain background with a slight gradient and noise, marks that nobody
asks about, and the objects. An object is one of eight shapes in one of eight colours, or a coloured
card with a number of one or two digits or a short word on it. With patches of 14 pixels, as the
bundled model has them, the picture is 18 x 18 patches. There are three layouts:

* `large`: one to six objects, at most one per cell of a 3 x 3 grid, each three to five patches
  wide. Even spacing of the kept tokens suits it.
* `small`: six to fourteen objects of one to two patches (a card: up to three), anywhere, among more
  marks and much empty space. Most tokens say nothing, and few say what a question asks.
* `mixed`: one or two large objects among small ones.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 252
GRID = 3
CELL = SIZE // GRID
MAX_OBJECTS = 14
LAYOUTS = {"large": 0.3, "small": 0.5, "mixed": 0.2}
"""Layouts, with the share of scenes that have each."""
SMALL, LARGE = (7.0, 12.0), (20.0, 34.0)
"""Least and greatest radius of small and of large objects, in pixels."""

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
WORDS = (
    *("bag", "bus", "cat", "cup", "dog", "egg", "fox", "hat"),
    *("ice", "jam", "key", "map", "oak", "pen", "sun", "zoo"),
)
"""What the cards without a number say."""
CARDS = 0.3
"""Share of cards among the objects."""
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""Names of the cells in reading order."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    `x`, `y` (its centre), `radius` (half its height) and `width` (half of it) are in pixels; `text`
    is what a card says, "" for other objects.
    """

    color: str
    shape: str
    text: str
    x: float
    y: float
    radius: float
    width: float

    @property
    def row(self) -> int:
        return int(self.y // CELL)

    @property
    def column(self) -> int:
        return int(self.x // CELL)

    @property
    def position(self) -> str:
        return POSITIONS[self.row * GRID + self.column]

    @property
    def small(self) -> bool:
        return self.radius <= SMALL[1]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        x, y, r, w = self.x, self.y, self.radius, self.width
        return x - w, y - r, x + w, y + r


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `things` are in reading order of their cells."""

    seed: int
    layout: str
    things: tuple[Thing, ...]
    marks: int
    background: tuple[int, int, int]
    gradient: Point
    noise: float

    def at(self, row: int, column: int) -> tuple[Thing, ...]:
        """The objects in a cell."""
        return tuple(t for t in self.things if (t.row, t.column) == (row, column))


def make_scene(seed: int, cards: float = CARDS, layouts: dict[str, float] | None = None) -> Scene:
    """The scene of a seed (any non-negative integer).

    `cards`: share of cards among its objects; `layouts`: shares other than LAYOUTS.
    """
    rng = random.Random(seed)
    shares = layouts or LAYOUTS
    layout = rng.choices(list(shares), list(shares.values()))[0]
    things: list[Thing] = []
    if layout == "large":
        for cell in rng.sample(range(GRID * GRID), rng.randint(1, 6)):
            row, column = divmod(cell, GRID)
            thing = _thing(
                rng, (column + 0.5) * CELL, (row + 0.5) * CELL, rng.uniform(*LARGE), cards
            )
            reach = [CELL / 2 - 2 - half for half in (thing.width, thing.radius)]
            right, down = (rng.uniform(-r, r) for r in reach)
            things.append(replace(thing, x=thing.x + right, y=thing.y + down))
    else:
        large = 0 if layout == "small" else rng.randint(1, 2)
        small = rng.randint(6, MAX_OBJECTS) if layout == "small" else rng.randint(4, 8)
        for size in [LARGE] * large + [SMALL] * small:
            for _ in range(30):
                radius = rng.uniform(*size)
                thing = _thing(rng, *_place(rng, radius), radius, cards)
                if all(_apart(thing, other) for other in things):
                    things.append(thing)
                    break
    things.sort(key=lambda t: (t.row, t.column, t.y, t.x))
    return Scene(
        seed=seed,
        layout=layout,
        things=tuple(things),
        marks=rng.randint(0, 6 if layout == "large" else 24),
        background=(rng.randint(170, 250), rng.randint(170, 250), rng.randint(170, 250)),
        gradient=(rng.uniform(-30, 30), rng.uniform(-30, 30)),
        noise=rng.uniform(0, 10),
    )


def _thing(rng: random.Random, x: float, y: float, radius: float, cards: float) -> Thing:
    """An object at a place. A card is as wide as its text, and inside the picture."""
    color = rng.choice(list(COLORS))
    if rng.random() >= cards:
        return Thing(color, rng.choice(SHAPES), "", x, y, radius, radius)
    if rng.random() < 0.4:
        text = rng.choice(WORDS)
    else:
        text = str(rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10, 100))
    radius = min(max(radius, 12.0), 24.0)
    width = max(radius * 0.8, _text_width(text, radius) / 2 + 4)
    x, y = (min(max(at, half + 2), SIZE - half - 2) for at, half in ((x, width), (y, radius)))
    return Thing(color, CARD, text, x, y, radius, width)


def _place(rng: random.Random, radius: float) -> Point:
    """A centre inside the picture and clearly in one cell."""
    edge = radius + 2

    def along() -> float:
        while True:
            at = rng.uniform(edge, SIZE - edge)
            if min(at % CELL, -at % CELL) > 6 or at < CELL / 2 or at > SIZE - CELL / 2:
                return at

    return along(), along()


def _apart(one: Thing, other: Thing) -> bool:
    """Whether the objects' boxes are three pixels apart, and a card was not moved to a border."""
    clear = min(one.x % CELL, -one.x % CELL) > 4 or min(one.x, SIZE - one.x) < CELL / 2
    return clear and (
        abs(one.x - other.x) > one.width + other.width + 3
        or abs(one.y - other.y) > one.radius + other.radius + 3
    )


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, SIZE x SIZE."""
    down, right = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    shade = scene.gradient[0] * down + scene.gradient[1] * right
    noise = np.random.default_rng(scene.seed).standard_normal((SIZE, SIZE), np.float32)
    pixels = np.array(scene.background, np.float32) + (shade + scene.noise * noise)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    rng = random.Random(f"marks {scene.seed}")
    for _ in range(scene.marks):
        _draw_mark(canvas, rng)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return image


def _draw_mark(canvas: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """A grey line or dot: it looks like something, and no question is about it."""
    gray = rng.randint(90, 200)
    x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, math.pi), rng.uniform(6, 30)
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        canvas.line([(x, y), end], fill=(gray,) * 3, width=rng.randint(1, 2))
    else:
        radius = rng.uniform(1, 4)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(gray,) * 3)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _font_size(radius: float) -> int:
    return round(radius * 1.5)


@cache
def _text_width(text: str, radius: float) -> float:
    return _font(_font_size(radius)).getlength(text)


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
            canvas.rectangle(thing.box, fill=color, outline=(20, 20, 20), width=1 if r < 13 else 2)
            bright = np.dot(color, (0.3, 0.59, 0.11)) > 130
            ink = (15, 15, 15) if bright else (255, 255, 255)
            canvas.text((x, y), thing.text, fill=ink, font=_font(_font_size(r)), anchor="mm")
        case _:
            raise ValueError(f"no such shape: {thing.shape!r}")
