# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 against the oracle, and what serving semantics the runner has a part in.

The tests are those of Model Runner V1 where they hold for both. `compiled` means: compiled and with
CUDA graphs as on a GPU, see `cuda_graphs`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints import sample_images
from tests.engine import (
    test_compilation,
    test_criteria,
    test_lora,
    test_oracle,
    test_prefix_cache,
    test_request_options,
    test_serving,
    test_step_limit,
)
from tests.engines import IMAGE_TOKENS, Case, least_pool, watched
from tests.interpreted.cuda_graphs import runner_of
from tests.world import World, assert_equals_oracle

PICTURES = tuple(sample_images(8, seed=3))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


def test_it_is_model_runner_v2(world: World) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from himap_vllm.runner.v2 import PruningModelState

    runner = runner_of(world.engine())
    assert isinstance(runner, GPUModelRunner)
    assert type(runner.model_state) is PruningModelState


def test_one_mixed_batch_equals_the_oracle(world: World) -> None:
    """Half of the cases, as each step takes seconds here; of every prompt, at other ratios."""
    period = len(test_oracle.PROMPTS) + 1
    cases = [case for i, case in enumerate(test_oracle.CASES) if (i + i // period) % 2 == 0]
    assert {bool(case.images) for case in cases} == {True, False}
    test_oracle.batch_equals_oracle(world, "gqa12", True, "balanced", cases)


# mixed: fastv and diversity
@pytest.mark.parametrize(
    ("criterion", "kv_grouping"),
    [("uniform+half", "balanced"), ("mixed", "balanced"), ("stratified+debiased", "many")],
)
def test_other_criteria_equal_the_oracle(world: World, criterion: str, kv_grouping: str) -> None:
    test_criteria.test_one_mixed_batch_equals_the_oracle(world, criterion, kv_grouping)


@pytest.mark.parametrize(
    "test",
    [
        test_serving.test_long_prompts_are_chunked_and_pruned_ones_only_before_the_image,
        test_prefix_cache.test_prefix_cache_serves_prompts_with_images,
        test_prefix_cache.test_several_answers_prune_once,
        test_request_options.test_prompt_logprobs_and_pruning_exclude_each_other,
    ],
)
def test_as_on_v1_with_graphs(world: World, test: Any) -> None:
    test(world, compiled=True)


@pytest.mark.parametrize(
    "test",
    [
        test_request_options.test_counters_tell_what_was_done,
        test_request_options.test_traces_by_name,
        test_step_limit.test_a_prompt_that_never_fits_a_step,
        test_step_limit.test_a_conversation_is_computed_turn_by_turn,
        test_prefix_cache.test_turns_go_on_where_the_last_one_ended,
        test_serving.test_a_request_that_was_not_admitted_runs_unpruned,
        test_lora.test_a_mixed_batch_equals_the_oracle_on_merged_weights,
        test_criteria.test_turns_of_the_default,
    ],
)
def test_as_on_v1(world: World, test: Any) -> None:
    test(world)


def test_ratios_and_lengths_without_a_recompilation(world: World) -> None:
    """Fewer than on V1, as each step takes seconds here."""
    test_compilation.assert_nothing_is_compiled_again(world, 18)


def test_preempted_requests_are_recomputed_and_counted_once(world: World) -> None:
    """On V2 a preempted request ends, and arrives anew."""
    engine = world.engine(compiled=True, num_gpu_blocks_override=least_pool(512))
    ratios = [(0.5, 0.75), (0, 0), (0.9, 0.5), (0, 0), (0.25, 0.25), (0, 0)]
    cases = [
        Case(QUESTION, PICTURES[i : i + 1], pair, max_tokens=80) for i, pair in enumerate(ratios)
    ]
    preempted = set()

    def look(_: Any) -> None:
        for request in engine.scheduler.requests.values():
            if request.num_preemptions:
                preempted.add(request.request_id.rpartition("-")[0])

    with watched(engine, look):
        outputs = engine.generate(cases)
    for case, output in zip(cases, outputs, strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)
    pruned = [output.request_id for output in outputs[::2]]
    assert preempted & set(pruned)
    assert preempted - set(pruned)
    stats = engine.stats
    assert stats["requests"] == {"pruned": 3, "unpruned": 3}
    assert stats["recomputed"] > 0
    assert stats["image_tokens"] == 3 * IMAGE_TOKENS
    engine.generate([Case("Lets the worker hear of the last end.", max_tokens=1)])
    assert not runner_of(engine).himap.requests.plans
