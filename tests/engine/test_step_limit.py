# SPDX-License-Identifier: Apache-2.0
"""Pruned prompts and the limit of a step, on a real engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints import sample_images
from tests.engine.test_oracle import TURNS
from tests.engines import Case, chunks_of, watched
from tests.world import World, assert_equals_oracle

PICTURES = tuple(sample_images(4, seed=4))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
LIMIT = 96
NUM_DECODING = 12


def test_a_prompt_of_nearly_a_whole_step_begins_while_others_decode(world: World) -> None:
    """It fits a step, but none in which as many others decode; its text may run ahead."""
    engine = world.engine(max_num_batched_tokens=LIMIT)
    core = engine.llm.llm_engine
    case = Case("x" * 40 + "<image>" + "y" * 15, PICTURES[:1], (0.5, 0.75))
    decoding = Case("Go on.", (), None, max_tokens=60)
    for i in range(NUM_DECODING):
        core.add_request(f"decoding {i}", engine.prompt(decoding), engine.params(decoding))
    for _ in range(4):
        core.step()
    chunks: list[int] = []

    def look(output: Any) -> None:
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            if request_id.startswith("pruned") and num_tokens > 1:
                chunks.append(num_tokens)

    core.add_request("pruned", engine.prompt(case), engine.params(case))
    finished: list[Any] = []
    with watched(engine, look):
        while core.has_unfinished_requests():
            finished += [output for output in core.step() if output.finished]
    assert finished[0].request_id == "pruned"
    num_tokens = len(finished[0].prompt_token_ids)
    assert LIMIT - NUM_DECODING < num_tokens <= LIMIT
    assert len(chunks) == 2
    assert sum(chunks) == num_tokens
    assert_equals_oracle(world, engine, "mha12", case, finished[0])


def test_a_prompt_that_never_fits_a_step(world: World) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = world.engine(max_num_batched_tokens=96)
    too_long = QUESTION.replace("?", "? And" + " and" * 19)
    with pytest.raises(VLLMValidationError, match="--max-num-batched-tokens") as error:
        engine.generate([Case(too_long, PICTURES[:1], (0.5, 0.5))])
    assert error.value.parameter == "himap_shallow_ratio"
    # Only the server's default asks for pruning: unpruned, and counted.
    before = engine.stats["requests"].get("bypassed_too_long", 0)
    case = Case(too_long, PICTURES[:1], None)
    (output,) = engine.generate([case])
    assert_equals_oracle(world, engine, "mha12", case, output)
    assert engine.stats["requests"]["bypassed_too_long"] == before + 1


def test_the_tightest_of_the_step_limits_counts(world: World) -> None:
    """A request admitted by the looser one would wait for ever."""
    from vllm.exceptions import VLLMValidationError

    engine = world.engine(max_num_batched_tokens=96, max_num_scheduled_tokens=512)
    with pytest.raises(VLLMValidationError, match=r"at most 96\. Raise --max-num-batched-tokens"):
        engine.generate([Case("<image>" + " and" * 30, PICTURES[:1], (0.5, 0.5))])


def test_a_conversation_is_computed_turn_by_turn(world: World) -> None:
    """It is longer than a step, and so are several of its turns together; others decode."""
    engine = world.engine(max_num_batched_tokens=LIMIT)
    cases = [Case("Go on.", (), None, max_tokens=30)]
    for i, ratios in enumerate(((0.5, 0.75), (0.9, 0.5), ((0.0, 0.5, 0.5), (0.5, 0.0, 0.75)))):
        before = f"{i} words of a system prompt. " * (2 * i)
        prompt = before + TURNS.replace("And <image> or", "And <image>, or")
        cases.append(Case(prompt, (PICTURES * 2)[i : i + 3], ratios))
    cases.append(Case(TURNS.replace(" or <image>", " what"), PICTURES[:2], (0.5, 0.75)))
    with chunks_of(engine) as chunks:
        outputs = engine.generate(cases)
    for case, output in zip(cases, outputs, strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)
        if case.images:
            assert len(output.prompt_token_ids) > LIMIT
            assert len(chunks[output.request_id]) > 2
    # With the votes of all text it is one piece, too long for a step.
    before = engine.stats["requests"].get("bypassed_too_long", 0)
    engine.generate([Case(TURNS, PICTURES[:3], None, votes="all", max_tokens=1)])
    assert engine.stats["requests"]["bypassed_too_long"] == before + 1
