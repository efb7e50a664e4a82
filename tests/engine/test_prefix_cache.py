# SPDX-License-Identifier: Apache-2.0
"""What the prefix cache serves, also under memory pressure, on a real engine."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from tests.checkpoints import sample_images
from tests.engines import BLOCK_SIZE, GROUPING, Case, Engine
from tests.world import World, assert_equals_oracle, compiled_or_not

PICTURES = tuple(sample_images(2, seed=1))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
LONG_TEXT = "Many words come before the picture, and they say little of it. " * 4  # 256 tokens
PROMPT = [5 + i % 90 for i in range(641)]
MEMORY = 1120  # tokens
ALIGNED = GROUPING.alignment


def cached_tokens(engine: Engine, others: int) -> int:
    """Tokens of `PROMPT` still cached after other requests had `others` tokens."""
    engine.llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for tokens in (PROMPT, [3] * others, PROMPT):
        (output,) = engine.llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    found: int = output.num_cached_tokens
    return found


def test_unpruned_prefixes_last_as_long_as_stocks(world: World) -> None:
    options: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 1024}
    stock = world.stock(num_gpu_blocks_override=1 + MEMORY // BLOCK_SIZE, **options)
    ours = world.engine(
        num_gpu_blocks_override=1 + MEMORY * 12 // GROUPING.page,
        himap={"shallow_ratio": 0, "deep_ratio": 0},
        **options,
    )
    found = [(cached_tokens(stock, n), cached_tokens(ours, n)) for n in (480, 560, 700, 850, 990)]
    assert found[1][0] == 544
    assert all(mine >= theirs - 2 * ALIGNED for theirs, mine in found)
    assert found[-1][0] < 256


@compiled_or_not
def test_prefix_cache_serves_what_precedes_the_image(world: World, compiled: bool) -> None:
    engine = world.engine(compiled=compiled)
    prompt = LONG_TEXT + QUESTION
    before_image = (prompt.index("<image>") + 1) // ALIGNED * ALIGNED
    pruned = [Case(prompt, PICTURES[:1], ratios) for ratios in ((0.5, 0.75), (0.75, 0.25))]
    unpruned = [Case(prompt, PICTURES[:1], (0, 0)) for _ in range(2)]
    other_picture = Case(prompt, PICTURES[1:2], (0.5, 0.75))
    engine.llm.reset_prefix_cache()
    hits = []
    for case in (pruned[0], pruned[1], unpruned[0], unpruned[1], pruned[0], other_picture):
        (output,) = engine.generate([case])
        assert_equals_oracle(world, engine, "mha12", case, output)
        hits.append(output.num_cached_tokens)
    everything = (len(output.prompt_token_ids) - 1) // ALIGNED * ALIGNED
    # A pruned prompt published nothing from its image on, an unpruned one everything, and a
    # pruned one after it still reads only what precedes the image.
    assert hits == [0, before_image, before_image, everything, before_image, before_image]


def test_prefix_cache_of_images_with_ratios_of_their_own(world: World) -> None:
    engine = world.engine()
    prompt = "A: <image> and B: <image> Which?"
    ratios: tuple[Any, ...] = (((0.0, 0.5), (0.0, 0.75)), ((0.5, 0.0), (0.75, 0.0)), (0, 0))
    first, second, unpruned = (Case(prompt, PICTURES[:2], pairs) for pairs in ratios)
    engine.llm.reset_prefix_cache()
    hits = []
    for case in (first, second, unpruned, second, first, unpruned):
        (output,) = engine.generate([case])
        assert_equals_oracle(world, engine, "mha12", case, output)
        hits.append(output.num_cached_tokens)
    everything = (len(output.prompt_token_ids) - 1) // ALIGNED * ALIGNED
    assert hits == [0, 0, 0, 0, 0, everything]
