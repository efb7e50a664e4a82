# SPDX-License-Identifier: Apache-2.0
"""Draw the mechanism for the README: `python docs/pictures/mechanism.py [--check]`.

Writes docs/mechanism.svg (light) and docs/mechanism-dark.svg. `--check` changes nothing and fails
if a file is not current. The prompt is the one of bench/results/cpu-2-cores.md: 576 image tokens
and 54 text tokens, 32 layers, K1 = 2, K2 = 8, ratios (0.5, 0.75), KV cache blocks of 32 tokens.
Tokens and layers are to scale; which image tokens survive is an example.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from himap_vllm.plan.prompt import kept

FOLDER = Path(__file__).parents[1]

STAGE_LAYERS = ((0, 2), (2, 8), (8, 32))
RATIOS = (0.5, 0.75)
BLOCK_TOKENS = 32
COLUMN_TOKENS = 18
TEXT, IMAGE, QUESTION = 1, 32, 2  # columns
SURVIVORS = (
    range(IMAGE),
    (1, 2, 5, 6, 7, 10, 11, 12, 13, 17, 18, 21, 22, 25, 28, 30),
    (6, 11, 12, 22),
)

# Pixels.
LAYER, COLUMN, BLOCK, CUT = 9, 13, 9, 42
LEFT, TOP = 126, 62
RIGHT = LEFT + (TEXT + IMAGE + QUESTION) * COLUMN
BLOCKS_LEFT = RIGHT + 36
WIDTH, HEIGHT = BLOCKS_LEFT + 312, TOP + 32 * LAYER + 2 * CUT + 52
FONTS = "-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of a theme."""

    page: str
    ink: str
    soft: str
    text: str
    image: str
    question: str
    block: str
    gone: str


LIGHT = Palette(
    page="#ffffff", ink="#1f2328", soft="#59636e", text="#8c959f",
    image="#2f81f7", question="#d4700f", block="#1a9c77", gone="#e4e8ec",
)  # fmt: skip
DARK = Palette(
    page="#0d1117", ink="#e6edf3", soft="#9198a1", text="#6e7681",
    image="#4493f8", question="#f0883e", block="#2dba8d", gone="#282e36",
)  # fmt: skip
FILES = {"mechanism.svg": LIGHT, "mechanism-dark.svg": DARK}


def _box(x: int, y: int, width: int, height: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{fill}"/>'


def _label(x: int, y: int, words: str, fill: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{fill}" {style}>{words}</text>'


def _column(index: int) -> int:
    return LEFT + index * COLUMN


BOLD, MIDDLE, END = 'font-weight="600"', 'text-anchor="middle"', 'text-anchor="end"'


def _headings(image_tokens: int, colours: Palette) -> list[str]:
    image, question, y = _column(TEXT), _column(TEXT + IMAGE), TOP - 14
    middle = (image + question) // 2
    return [
        _label(image - 2, y, "text", colours.soft, f"{BOLD} {END}"),
        _label(middle, y, f"{image_tokens} image tokens", colours.image, f"{BOLD} {MIDDLE}"),
        _label(question + COLUMN, y, "question", colours.question, f"{BOLD} {MIDDLE}"),
        _label(BLOCKS_LEFT, y, "KV cache blocks per layer", colours.block, BOLD),
    ]


def _tokens(stage: int, y: int, colours: Palette) -> list[str]:
    """A bar per column, through all layers of the stage."""
    num_layers = STAGE_LAYERS[stage][1] - STAGE_LAYERS[stage][0]
    fills = [
        *[colours.text] * TEXT,
        *(colours.image if i in SURVIVORS[stage] else colours.gone for i in range(IMAGE)),
        *[colours.question] * QUESTION,
    ]
    bars = [
        _box(_column(index), y, COLUMN - 2, num_layers * LAYER, fill)
        for index, fill in enumerate(fills)
    ]
    between = "".join(f"M{LEFT} {y + layer * LAYER}H{RIGHT}" for layer in range(1, num_layers))
    return [*bars, f'<path d="{between}" stroke="{colours.page}" stroke-width="1.5"/>']


def _blocks(stage: int, blocks: list[int], y: int, colours: Palette) -> list[str]:
    """The stage's name on the left, its blocks on the right."""
    first, end = STAGE_LAYERS[stage]
    fills = [colours.block] * blocks[stage] + [colours.gone] * (blocks[0] - blocks[stage])
    times = f"{blocks[stage]} &#215; {end - first} layers"
    return [
        _label(LEFT - 12, y, f"layers {first} to {end - 1}", colours.ink, f"{BOLD} {END}"),
        *(_box(BLOCKS_LEFT + i * BLOCK, y - 11, BLOCK - 2, 13, f) for i, f in enumerate(fills)),
        _label(BLOCKS_LEFT + blocks[0] * BLOCK + 8, y, times, colours.ink, BOLD),
    ]


def _cut(words: str, voter: int, y: int, colour: str, ink: str) -> list[str]:
    """An arrow from the voters to the image, and what happens."""
    end, arrow = _column(TEXT + 22), y + 11
    line = f"M{voter} {arrow}H{end}M{end + 6} {arrow - 4}L{end} {arrow}L{end + 6} {arrow + 4}"
    return [
        f'<path d="{line}" stroke="{colour}" stroke-width="1.5" fill="none"/>',
        _label(LEFT, y + 30, words, ink),
    ]


def draw(colours: Palette) -> str:
    """The picture as SVG."""
    counts = [IMAGE * COLUMN_TOKENS]
    for ratio in RATIOS:
        counts.append(kept(counts[-1], ratio))
    assert [len(columns) * COLUMN_TOKENS for columns in SURVIVORS] == counts
    text_tokens = (TEXT + QUESTION) * COLUMN_TOKENS
    blocks = [-(-(count + text_tokens) // BLOCK_TOKENS) for count in counts]
    used = sum(n * (end - first) for n, (first, end) in zip(blocks, STAGE_LAYERS, strict=True))
    whole = blocks[0] * STAGE_LAYERS[-1][1]
    cuts = (
        (
            f"cut 1: the question's attention ranks the image tokens; {counts[1]} stay",
            RIGHT - COLUMN,
        ),
        (f"cut 2: the image's own attention ranks the rest; {counts[2]} stay", RIGHT - 3 * COLUMN),
    )

    shapes, y = _headings(counts[0], colours), TOP
    for stage, (first, end) in enumerate(STAGE_LAYERS):
        height = (end - first) * LAYER
        shapes += _tokens(stage, y, colours)
        shapes += _blocks(stage, blocks, y + min(height, 60) // 2 + 4, colours)
        y += height
        if stage < len(cuts):
            voter_colour = (colours.question, colours.image)[stage]
            shapes += _cut(*cuts[stage], y, voter_colour, colours.ink)
            y += CUT
    shapes += [
        _label(BLOCKS_LEFT, y - 100, f"{used} blocks instead of {whole}", colours.ink,
               f'{BOLD} font-size="17"'),
        _label(BLOCKS_LEFT, y - 77, f"{100 * used / whole:.1f} % of stock vLLM's KV cache",
               colours.soft),
        _label(BLOCKS_LEFT, y - 58, f"for this prompt (blocks of {BLOCK_TOKENS} tokens)",
               colours.soft),
        _box(LEFT, y + 20, COLUMN - 2, 14, colours.gone),
        _label(LEFT + COLUMN + 6, y + 32,
               "dropped: not computed in these layers, and without a place in the KV cache there",
               colours.soft),
    ]  # fmt: skip
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="{FONTS}" font-size="13" role="img">'
    )
    title = "<title>Image tokens by decoder layer, and the KV cache blocks they take</title>"
    page = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{colours.page}"/>'
    return "\n".join([head, title, page, *shapes, "</svg>\n"])


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args(argv).check
    stale = False
    for name, colours in FILES.items():
        path, drawn = FOLDER / name, draw(colours)
        if path.exists() and path.read_text() == drawn:
            continue
        stale = True
        if check:
            print(f"{name} is not current: run python docs/pictures/mechanism.py")
        else:
            path.write_text(drawn)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
