# SPDX-License-Identifier: Apache-2.0
"""The prefix cache under memory pressure, on a real engine."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from tests.engines import BLOCK_SIZE, Engine
from tests.world import World

PROMPT = [5 + i % 90 for i in range(641)]
MEMORY = 1120  # tokens
NUM_GROUPS = 6  # of two layers: 2 / 6 / 4 layers per stage


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
    blocks = MEMORY // BLOCK_SIZE
    stock = world.stock(num_gpu_blocks_override=1 + blocks, **options)
    ours = world.engine(
        num_gpu_blocks_override=1 + blocks * NUM_GROUPS,
        himap={"shallow_ratio": 0, "deep_ratio": 0},
        **options,
    )
    found = [(cached_tokens(stock, n), cached_tokens(ours, n)) for n in (480, 560, 700, 850, 990)]
    assert found[1][0] == 544
    assert all(mine >= theirs - 2 * BLOCK_SIZE for theirs, mine in found)
    assert found[-1][0] < 256
