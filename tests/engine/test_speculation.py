# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding by n-gram: drafts, accepted and rejected, behind pruned prompts.

In a process of its own: the proposer imports numba, and then vLLM (0.32) can't start another engine
on a CPU in the same process (`vllm.triton_utils.dispatcher` reads attributes of numba's modules).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import isolated
from tests.checkpoints import sample_images
from tests.engines import Case, Engine, watched
from tests.world import World, assert_equals_oracle

PICTURES = tuple(sample_images(4, seed=9))
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
TOKENS = 40


def generate(engine: Engine, cases: list[Case]) -> tuple[list[Any], int, int]:
    """The outputs, how many tokens were drafted, and how many of them were accepted."""
    drafted = decodes = 0

    def look(output: Any) -> None:
        nonlocal drafted, decodes
        drafted += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        new = {request.req_id for request in output.scheduled_new_reqs}
        decodes += len(output.num_scheduled_tokens.keys() - new)

    with watched(engine, look):
        outputs = engine.generate(cases)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    return outputs, drafted, generated - len(cases) - decodes


def equals_oracle(folder: Path) -> None:
    """One batch of pruned and unpruned requests."""
    world = World(folder)
    engine = world.engine(speculative_config=NGRAM)
    repeated = "one two one two one two "
    cases = [
        Case(f"USER: <image>\n{repeated}ASSISTANT:", PICTURES[:1], (0.5, 0.75), TOKENS),
        Case(f"{repeated}<image> or <image>? {repeated}", PICTURES[1:3], (0.25, 0.9), TOKENS),
        Case(f"USER: <image>\n{repeated}ASSISTANT:", PICTURES[3:], (0, 0), TOKENS),
        Case(repeated, (), None, TOKENS),
    ]
    outputs, drafted, accepted = generate(engine, cases)
    assert 0 < accepted < drafted
    for case, output in zip(cases, outputs, strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)


def test_ngram(tmp_path: Path) -> None:
    isolated.call(equals_oracle, tmp_path)
