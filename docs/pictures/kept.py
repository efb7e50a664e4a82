# SPDX-License-Identifier: Apache-2.0
"""Draws `examples/kept.png`: what two criteria keep of `examples/scene.png` for one question.

    python docs/pictures/kept.py

Each criterion is served by an engine of its own, with the cuts and ratios of the bundled model, and
asked through the gateway; `himap.trace` says what each cut kept.
"""

from __future__ import annotations

import base64
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

from himap_eval.local_server import serving
from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
SCENE, OUT = ROOT / "examples" / "scene.png", ROOT / "examples" / "kept.png"
QUESTION = "What number is on the pink card?"
CRITERIA = {"uniform": "even spacing", "uniform+half": "spacing and the question"}
RATIOS = {"shallow_ratio": 0.5, "deep_ratio": 0.75}
SCALE, LINE, GAP = 2, 22, 12
FADED = {0: 0.12, 1: 0.4, 2: 1.0}
"""Share of its colours that a token keeps in the picture, by the number of cuts it survived."""


def ask(url: str) -> tuple[str, dict[str, Any]]:
    """The answer, and the grid of the picture's tokens."""
    data = base64.b64encode(SCENE.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    message: Any = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
    client = OpenAI(base_url=url, api_key="none")
    answer: Any = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[message],
        temperature=0,
        extra_body={"himap": {"trace": True, **RATIOS}},
    )
    (grid,) = answer.usage.himap["images"][0]["trace"]["grids"]
    return answer.choices[0].message.content.strip(), grid


def survived(runs: list[int]) -> list[bool]:
    """Cell by cell, of run lengths: dropped, kept, dropped, ..."""
    return [kept for length, kept in zip(runs, cycle((False, True))) for _ in range(length)]


def faded(picture: Image.Image, grid: dict[str, Any]) -> Image.Image:
    """The picture, with tokens fainter the earlier they were dropped."""
    white = Image.new("RGB", picture.size, "white")
    shown = picture.copy()
    box = grid["box"]
    cells = zip(survived(grid["kept_shallow"]), survived(grid["kept_deep"]), strict=True)
    for index, cuts in enumerate(map(sum, cells)):
        row, column = divmod(index, grid["columns"])
        left = box["left"] + column * box["cell_width"]
        top = box["top"] + row * box["cell_height"]
        area = tuple(map(round, (left, top, left + box["cell_width"], top + box["cell_height"])))
        cell = Image.blend(white.crop(area), picture.crop(area), FADED[cuts])
        shown.paste(cell, area[:2])
    return shown


def main() -> None:
    picture = Image.open(SCENE).convert("RGB")
    panels = [("the picture", picture)]
    for criterion, name in CRITERIA.items():
        flags = ["--enforce-eager", "--criterion", criterion]
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(None, flags, Path(folder, "log")) as url,
        ):
            answer, grid = ask(url)
        print(f"{criterion}: {answer}")
        panels.append((f"by {name}: “{answer}”", faded(picture, grid)))
    width, height = (SCALE * side for side in picture.size)
    sheet = Image.new("RGB", (3 * width + 2 * GAP, height + LINE), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for place, (text, panel) in enumerate(panels):
        left = place * (width + GAP)
        sheet.paste(panel.resize((width, height), Image.Resampling.NEAREST), (left, 0))
        canvas.text((left, height + 2), text, fill="black", font=font)
    sheet.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
