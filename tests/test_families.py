# SPDX-License-Identifier: Apache-2.0
"""Every family of the table, against the oracle and against stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from himap_vllm.models import FAMILIES
from tests.checkpoints import sample_images
from tests.conftest import Case, Engine, World, assert_equals_oracle
from tests.families import TINY

RATIOS = ((0.25, 0.5), (0.5, 0.75), (0.75, 0.25), (0.9, 0.9), (0.5, 0.0))
SIZES = ((112, 112), (60, 120), (150, 70), (56, 56))
PICTURES = tuple(
    picture.resize(SIZES[index % len(SIZES)])
    for index, picture in enumerate(sample_images(8, seed=5))
)
PROMPTS = {  # {0}: an image
    "one image": ("USER: {0}\nWhat is this? ASSISTANT:", 1),
    "two sizes": ("USER: {0}\n{0}\nCompare. ASSISTANT:", 2),
    "earlier turns": (
        "USER: {0}\nWhat is it? ASSISTANT: A shape.</s>USER: And {0} this? ASSISTANT:",
        2,
    ),
}


def pictures(start: int, count: int) -> tuple[Image.Image, ...]:
    return tuple(PICTURES[(start + k) % len(PICTURES)] for k in range(count))


def cases(image: str) -> list[Case]:
    """Every prompt at every ratio pair, unpruned and text-only prompts between them."""
    made = []
    for i, ratios in enumerate(((0.0, 0.0), *RATIOS)):
        for j, (prompt, count) in enumerate(PROMPTS.values()):
            made.append(Case(prompt.format(image), pictures(i + j, count), ratios))
        made.append(Case(f"No picture here, only {i} words. Go on:", (), ratios))
    return made


def equal_oracle(world: World, engine: Engine, name: str, mixed: list[Case]) -> None:
    """Run the cases as one batch."""
    ties = 0
    for case, output in zip(mixed, engine.generate(mixed), strict=True):
        expected = world.oracle(name, case)
        if min(expected.margin, expected.score_margin) < 1e-5:
            ties += 1  # within rounding: either answer is right
            continue
        assert_equals_oracle(world, engine, name, case, output)
    assert ties <= len(mixed) // 6


@pytest.mark.parametrize("name", TINY)
def test_a_mixed_batch_equals_the_oracle(world: World, name: str) -> None:
    equal_oracle(world, world.engine(name), name, cases(TINY[name].image))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_compiled(world: World, name: str) -> None:
    """M-RoPE positions and deepstack features go into compiled segments."""
    equal_oracle(world, world.engine(name, compiled=True), name, cases(TINY[name].image))


@pytest.mark.parametrize("name", TINY)
def test_ratio_zero_equals_stock(world: World, name: str) -> None:
    prompts = [
        Case(prompt.format(TINY[name].image), pictures(j, count), (0.0, 0.0), max_tokens=20)
        for j, (prompt, count) in enumerate(PROMPTS.values())
    ]
    answers = []
    for engine in (world.engine(name), world.stock(name)):
        answers.append([tuple(o.outputs[0].token_ids) for o in engine.generate(prompts)])
    assert answers[0] == answers[1]


def test_the_table_is_tested(world: World) -> None:
    tested = {
        json.loads((world.checkpoint(name) / "config.json").read_text())["architectures"][0]
        for name in (*TINY, "mha12")
    }
    assert tested == FAMILIES.keys()


def test_the_readme_shows_the_table() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for family in FAMILIES.values():
        assert f"| {family.models} | `{family.architecture}` |" in readme
