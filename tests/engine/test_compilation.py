# SPDX-License-Identifier: Apache-2.0
"""torch.compile: the decoder's segments are compiled at start-up, and never again."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
import torch

from tests.checkpoints import sample_images
from tests.engines import Case
from tests.world import World

PICTURES = sample_images(8, seed=6)


def compilations() -> dict[str, Any]:
    """Everything that torch and vLLM count when they trace or compile."""
    from vllm.compilation.counter import compilation_counter

    dynamo = {key: dict(values) for key, values in torch._dynamo.utils.counters.items()}
    return {**asdict(compilation_counter), "dynamo": dynamo}


@pytest.mark.xdist_group("compiled")
def test_fifty_ratios_and_lengths_without_a_recompilation(world: World) -> None:
    assert_nothing_is_compiled_again(world, 50)


def assert_nothing_is_compiled_again(world: World, number: int) -> None:
    """In steps of three prompts; each has ratios, a length and pictures of its own."""
    engine = world.engine(compiled=True)
    rng = random.Random(0)
    cases = []
    for _ in range(number):
        num_images = rng.randrange(1, 4)
        ratios = (round(rng.uniform(0, 0.95), 3), round(rng.uniform(0.05, 0.95), 3))
        text = "x" * rng.randrange(200)
        cases.append(
            Case(
                "<image>" * num_images + text + "?",
                tuple(rng.sample(PICTURES, num_images)),
                ratios,
                max_tokens=rng.randrange(1, 4),
            )
        )
    # vLLM compiles what it needs for log-probabilities when they are first wanted, for one row and
    # for several; unpruned requests bring that about.
    engine.generate([Case("One.")])
    engine.generate([Case("Two."), Case("Three.")])
    before = compilations()
    # vLLM's cache may have them; on Model Runner V2 they are compiled in pieces, by no compiler.
    counts = ("num_aot_compiles", "num_aot_artifacts_loaded", "num_eager_compiles")
    assert sum(before[name] for name in counts) >= 3  # otherwise nothing here could fail
    steps = engine.stats["steps"]
    for begin in range(0, number, 3):
        engine.generate(cases[begin : begin + 3])
    assert engine.stats["steps"] >= steps + number / 3
    assert len({case.ratios for case in cases}) == number
    assert compilations() == before
