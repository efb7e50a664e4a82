# SPDX-License-Identifier: Apache-2.0
"""Every family of the table, against the oracle and against stock vLLM."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from himap_vllm.model.families import FAMILIES
from tests.checkpoints import sample_images
from tests.engines import Case, Engine
from tests.families import QWEN_IMAGE, TINY, every_family
from tests.world import World, assert_equals_oracle

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
        "USER: {0}\nWhat is it? ASSISTANT: A shape.</s>USER: And {0} this? ASSISTANT: Two.</s>"
        "USER: Sure? ASSISTANT:",
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


@every_family
def test_a_mixed_batch_equals_the_oracle(world: World, name: str) -> None:
    equal_oracle(world, world.engine(name), name, cases(TINY[name].image))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_compiled(world: World, name: str) -> None:
    """M-RoPE positions and deepstack features go into compiled segments."""
    equal_oracle(world, world.engine(name, compiled=True), name, cases(TINY[name].image))


@every_family
def test_ratio_zero_equals_stock(world: World, name: str) -> None:
    prompts = [
        Case(prompt.format(TINY[name].image), pictures(j, count), (0.0, 0.0), max_tokens=20)
        for j, (prompt, count) in enumerate(PROMPTS.values())
    ]
    answers = []
    for engine in (world.engine(name), world.stock(name)):
        answers.append([tuple(o.outputs[0].token_ids) for o in engine.generate(prompts)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["qwen2.5-vl", "idefics3"])
def test_chunked_prefill(world: World, name: str) -> None:
    """Text before the first image comes in chunks, its keys back from the cache for the votes."""
    engine = world.engine(name, max_num_batched_tokens=128)
    before = "Many words come before the pictures, and say little of them. " * 3
    prompt = f"{before}{TINY[name].image} and {TINY[name].image}?"
    mixed = [Case(f"{i}. {prompt}", pictures(i, 2), RATIOS[i % 5]) for i in range(10)]
    turns = PROMPTS["earlier turns"][0].format(TINY[name].image)
    mixed += [Case(f"{i}. {before}{turns}", pictures(i, 2), RATIOS[i % 5]) for i in range(5)]
    equal_oracle(world, engine, name, mixed)


def test_the_table_is_tested(world: World) -> None:
    tested = {
        json.loads((world.checkpoint(name) / "config.json").read_text())["architectures"][0]
        for name in (*TINY, "mha12")
    }
    assert tested == FAMILIES.keys()


def test_the_list_of_models_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    for family in FAMILIES.values():
        assert f"| {family.models} | `{family.architecture}` |" in page


def test_prompts_with_video_run_unpruned_and_are_counted(world: World) -> None:
    engine, stock = world.engine("qwen2-vl"), world.stock("qwen2-vl")
    frames = np.stack([np.asarray(picture.resize((56, 56))) for picture in PICTURES[:4]])
    about = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    alone: dict[str, Any] = {
        "prompt": f"{video}What happens?",
        "multi_modal_data": {"video": [(frames, about)]},
    }
    with_image = {
        "prompt": f"{QWEN_IMAGE}{video}What happens?",
        "multi_modal_data": {**alone["multi_modal_data"], "image": PICTURES[0]},
    }

    def answers(engine: Engine, **arguments: Any) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **arguments)
        outputs = engine.llm.generate([alone, with_image], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    before = engine.stats["requests"]
    assert answers(engine) == answers(stock)
    assert Counter(engine.stats["requests"]) - Counter(before) == {"bypassed_video": 2}
    with pytest.raises(VLLMValidationError, match="prompts with video are not pruned") as refused:
        answers(engine, extra_args={"himap_shallow_ratio": 0.5})
    assert refused.value.parameter == "himap_shallow_ratio"
