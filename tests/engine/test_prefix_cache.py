# SPDX-License-Identifier: Apache-2.0
"""What the prefix cache serves, also under memory pressure, on a real engine."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from tests.checkpoints import sample_images
from tests.engines import (
    BLOCK_SIZE,
    GROUPING,
    IMAGE_TOKENS,
    WARM,
    Case,
    Engine,
    least_pool,
    watched,
)
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


def ask(world: World, engine: Engine, *cases: Case) -> list[int]:
    """Ask one after the other; tokens of each that were cached. Hit or miss, answers are right."""
    found = []
    for case in cases:
        (output,) = engine.generate([case])
        assert_equals_oracle(world, engine, "mha12", case, output)
        found.append(output.num_cached_tokens)
    return found


def length(engine: Engine, case: Case) -> int:
    """Tokens of a case's prompt."""
    (output,) = engine.generate([case])
    return len(output.prompt_token_ids)


@compiled_or_not
def test_prefix_cache_serves_prompts_with_images(world: World, compiled: bool) -> None:
    engine = world.engine(compiled=compiled)
    prompt = LONG_TEXT + QUESTION
    before_image = (prompt.index("<image>") + 1) // ALIGNED * ALIGNED
    first, second = (
        Case(prompt, PICTURES[:1], ratios, params=WARM) for ratios in ((0.5, 0.75), (0.75, 0.25))
    )
    unpruned = [Case(prompt, PICTURES[:1], (0, 0), params=WARM) for _ in range(2)]
    other_picture = Case(prompt, PICTURES[1:2], (0.5, 0.75), params=WARM)
    whole = length(engine, first)
    engine.llm.reset_prefix_cache()
    before = engine.stats
    found = ask(world, engine, first, second, *unpruned, first, other_picture, second)
    # What is pruned in one way serves no prompt that is pruned in another, or not at all.
    everything = (whole - 1) // ALIGNED * ALIGNED
    assert found == [
        0, before_image, before_image, everything, whole - 1, before_image, whole - 1,
    ]  # fmt: skip
    after = engine.stats
    counted = {
        name: after["requests"].get(name, 0) - before["requests"].get(name, 0)
        for name in ("pruned", "reused", "unpruned")
    }
    assert counted == {"pruned": 3, "reused": 2, "unpruned": 2}
    for name, number in counted.items():
        tokens = after[f"image_tokens_{name}"] - before[f"image_tokens_{name}"]
        assert tokens == number * IMAGE_TOKENS


def test_prefix_cache_of_images_with_ratios_of_their_own(world: World) -> None:
    engine = world.engine()
    prompt = "A: <image> and B: <image> Which?"
    ratios: tuple[Any, ...] = (((0.0, 0.5), (0.0, 0.75)), ((0.5, 0.0), (0.75, 0.0)), (0, 0))
    first, second, unpruned = (Case(prompt, PICTURES[:2], pairs, params=WARM) for pairs in ratios)
    whole = length(engine, first)
    engine.llm.reset_prefix_cache()
    found = ask(world, engine, first, second, unpruned, second, first, unpruned)
    everything = (whole - 1) // ALIGNED * ALIGNED
    assert found == [0, 0, 0, whole - 1, whole - 1, everything]


@compiled_or_not
def test_several_answers_prune_once(world: World, compiled: bool) -> None:
    """A step has room for all of them. They wait for the first."""
    engine = world.engine(compiled=compiled)
    case = Case(QUESTION, PICTURES[:1], (0.5, 0.75), params=WARM)
    engine.llm.reset_prefix_cache()
    steps = engine.stats["steps"]
    outputs = engine.generate([case] * 4)
    for output in outputs:
        assert_equals_oracle(world, engine, "mha12", case, output)
    whole = len(outputs[0].prompt_token_ids)
    assert [output.num_cached_tokens for output in outputs] == [0] + [whole - 1] * 3
    assert engine.stats["steps"] == steps + 1


def test_turns_go_on_where_the_last_one_ended(world: World) -> None:
    """With the text of the conversation, then with the tokens that were generated."""
    engine = world.engine()
    turns = f"{QUESTION} A shape.</s>USER: And <image> that? ASSISTANT: Red.</s>USER: Is it? "
    engine.llm.reset_prefix_cache()
    ends = [turns.index(part) + len(part) for part in ("that? ASSISTANT:", "Is it? ")]
    first_turn, second_turn, third_turn = (
        Case(text, PICTURES[: text.count("<image>")], (0.5, 0.75), params=WARM)
        for text in (QUESTION, turns[: ends[0]], turns)
    )
    whole = [length(engine, case) for case in (first_turn, second_turn, third_turn)]
    engine.llm.reset_prefix_cache()
    found = ask(world, engine, first_turn, second_turn, third_turn, second_turn)
    assert found[0] == 0
    assert found[1] >= whole[0]
    assert found[2] >= whole[1]
    assert found[3] == whole[1] - 1

    (answer,) = engine.generate([first_turn])
    tokens = [*unexpanded(engine, answer.prompt_token_ids), *answer.outputs[0].token_ids]
    prompt = {
        "prompt_token_ids": [*tokens, *tokens[-4:]],
        "multi_modal_data": {"image": [PICTURES[0]]},
    }
    answers = []
    for params in (WARM, {}):
        case = Case("", ratios=(0.5, 0.75), params=params)
        (output,) = engine.llm.generate([prompt], engine.params(case), use_tqdm=False)
        answers.append(list(output.outputs[0].token_ids))
        if params:
            # All but the last token that was generated had been computed.
            assert output.num_cached_tokens >= len(output.prompt_token_ids) - 5
    assert answers[0] == answers[1]


def unexpanded(engine: Engine, token_ids: list[int]) -> list[int]:
    """A prompt's token ids with one placeholder for each image."""
    placeholder = engine.llm.llm_engine.model_config.hf_config.image_token_index
    return [
        token
        for token, before in zip(token_ids, [None, *token_ids], strict=False)
        if token != placeholder or before != placeholder
    ]


def test_salts_keep_prompts_apart(world: World) -> None:
    engine = world.engine()
    case = Case(LONG_TEXT + QUESTION, PICTURES[:1], (0.5, 0.75), params=WARM)
    engine.llm.reset_prefix_cache()
    found = []
    for salt in ("a", "b", "a"):
        prompt = {**engine.prompt(case), "cache_salt": salt}
        (output,) = engine.llm.generate([prompt], engine.params(case), use_tqdm=False)
        assert_equals_oracle(world, engine, "mha12", case, output)
        found.append(output.num_cached_tokens)
    assert found == [0, 0, len(output.prompt_token_ids) - 1]


def test_requests_on_one_image_hold_its_blocks_once(world: World) -> None:
    engine = world.engine()
    case = Case(LONG_TEXT + QUESTION, PICTURES[:1], (0.5, 0.75), max_tokens=20, params=WARM)
    pool = engine.scheduler.kv_cache_manager.block_pool
    engine.llm.reset_prefix_cache()
    (first,) = engine.generate([case])
    assert_equals_oracle(world, engine, "mha12", case, first)
    held = []

    def look(_: Any) -> None:
        if len(engine.scheduler.running) == 16:
            held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    with watched(engine, look):
        outputs = engine.generate([case] * 16)
    assert {tuple(output.outputs[0].token_ids) for output in outputs} == {
        tuple(first.outputs[0].token_ids)
    }
    shared = least_pool(len(first.prompt_token_ids))
    # Each has a copy of the last block of each group, and one more for its answer.
    assert 0 < max(held) <= shared + 16 * 2 * GROUPING.num_groups
    assert not pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
