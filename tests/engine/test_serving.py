# SPDX-License-Identifier: Apache-2.0
"""Serving semantics on a real engine: chunking, prefix caching, preemption, aborts, blocks."""

from __future__ import annotations

import random
from typing import Any

from himap_vllm.plan.requests import read_stamp
from tests.checkpoints import sample_images
from tests.engines import (
    DEEP_LAYER,
    SHALLOW_LAYER,
    WARM,
    Case,
    Engine,
    chunks_of,
    least_pool,
    watched,
)
from tests.world import World, assert_equals_oracle, compiled_or_not

PICTURES = tuple(sample_images(8, seed=1))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
LONG_TEXT = "Many words come before the picture, and they say little of it. " * 4  # 256 tokens


def free_blocks(engine: Engine) -> int:
    blocks: int = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return blocks


def equal_to_stock(engine: Engine, stock: Engine, cases: list[Case]) -> None:
    for ours, theirs in zip(engine.generate(cases), stock.generate(cases), strict=True):
        for completion, expected in zip(ours.outputs, theirs.outputs, strict=True):
            assert completion.text == expected.text
            assert list(completion.token_ids) == list(expected.token_ids)
            assert completion.finish_reason == expected.finish_reason


@compiled_or_not
def test_ratio_zero_equals_stock_token_for_token(world: World, compiled: bool) -> None:
    engine = world.engine(compiled=compiled, himap={"shallow_ratio": 0, "deep_ratio": 0})
    cases = [
        Case(QUESTION, PICTURES[:1], (0, 0), max_tokens=40),
        Case(QUESTION, PICTURES[1:2], None, max_tokens=40),
        Case(QUESTION, PICTURES[2:3], (0, 0), 40, {"temperature": 0.8, "seed": 7, "n": 2}),
        Case("No picture at all. Go on:", (), None, 40, {"stop": ["a", "7"], "ignore_eos": False}),
    ]
    equal_to_stock(engine, world.stock(compiled=compiled), cases)


@compiled_or_not
def test_long_prompts_are_chunked_and_pruned_ones_only_before_the_image(
    world: World, compiled: bool
) -> None:
    """Keys of the chunked text come back from the KV cache for the votes."""
    engine = world.engine(compiled=compiled, max_num_batched_tokens=96)
    cases = [  # beginning differently, so that no prefix is shared
        Case("A. " + LONG_TEXT + QUESTION, PICTURES[:1], (0.5, 0.75)),
        Case("B. " + LONG_TEXT, (), (0.5, 0.75)),
        Case("C. " + LONG_TEXT + QUESTION, PICTURES[1:2], (0.25, 0.9)),
        Case("D. " + LONG_TEXT + QUESTION, PICTURES[2:3], (0, 0)),
        Case("E. " + LONG_TEXT[:100] + QUESTION, PICTURES[3:4], (0.75, 0.5)),
    ]
    with chunks_of(engine) as chunks:
        outputs = engine.generate(cases)
    for case, output in zip(cases, outputs, strict=True):
        assert len(chunks[output.request_id]) > 1
        if case.images and case.ratios != (0, 0):
            # The last chunk begins at or before the first image token.
            before_image = case.prompt.index("<image>") + 1
            assert sum(chunks[output.request_id][:-1]) <= before_image
        assert_equals_oracle(world, engine, "mha12", case, output)


def test_a_request_that_was_not_admitted_runs_unpruned(world: World) -> None:
    """Nobody has checked its ratios; the engine core must survive them."""
    engine = world.engine()
    core = engine.llm.llm_engine
    processor = core.input_processor
    case = Case(QUESTION, PICTURES[:1], None)
    for args in ({"himap_shallow_ratio": "0.5"}, {"himap_shallow_ratio": 3.0}):
        params = engine.params(case)
        params.extra_args = args
        bare = type(processor).process_inputs.__wrapped__
        request = bare(processor, "bare", engine.prompt(case), params, ("generate",))
        core.add_request("bare", request, params)
        while core.has_unfinished_requests():
            finished = [output for output in core.step() if output.finished]
        assert_equals_oracle(world, engine, "mha12", case, finished[0])


def test_blocks_held_equal_the_arithmetic_at_every_step(world: World) -> None:
    engine = world.engine("gqa12")
    rng = random.Random(0)
    cases = [
        Case(
            QUESTION + "x" * rng.randrange(60),
            PICTURES[: rng.randrange(4)] if i % 4 else (),
            rng.choice([None, (0, 0), (0.5, 0.75), (0.9, 0.9), (0.25, 0.5)]),
            max_tokens=rng.randrange(1, 40),
        )
        for i in range(24)
    ]
    cases = [
        Case(
            "<image>" * len(case.images) + case.prompt.replace("<image>", ""),
            case.images,
            ((0.0, 0.5, 0.25)[: len(case.images)], 0.5) if i % 5 == 0 else case.ratios,
            case.max_tokens,
        )
        for i, case in enumerate(cases)
    ]
    checked = 0

    def kept(num_tokens: int, ratio: float) -> int:
        return max(1, num_tokens - int(num_tokens * ratio + 1e-6))

    def look(_: Any) -> None:
        nonlocal checked
        scheduler = engine.scheduler
        manager = scheduler.kv_cache_manager
        for request in scheduler.running:
            plan = scheduler.himap_plans.get(request.request_id)
            # Every prompt fits in one step, so none started with a part of an image's unit.
            assert plan is None or request.num_computed_tokens >= plan.units[-1].end
            ratios = read_stamp(request.sampling_params).ratios
            pairs = [(own.shallow, own.deep) for own in ratios] or [(0, 0)] * 3
            expected = []
            for group in manager.kv_cache_config.kv_cache_groups:
                num_tokens = request.num_computed_tokens
                for image, (shallow, deep) in zip(request.mm_features, pairs, strict=False):
                    alive = image.mm_position.length
                    first = min(int(name.split(".")[3]) for name in group.layer_names)
                    if first >= SHALLOW_LAYER:
                        alive = kept(alive, shallow)
                    if first >= DEEP_LAYER:
                        alive = kept(alive, deep)
                    num_tokens -= image.mm_position.length - alive
                expected.append(-(-num_tokens // group.kv_cache_spec.block_size))
            held = [len(ids) for ids in manager.get_block_ids(request.request_id)]
            assert held == expected
            checked += 1

    before = free_blocks(engine)
    with watched(engine, look):
        engine.generate(cases)
    assert checked > 200
    assert free_blocks(engine) == before


@compiled_or_not
def test_preempted_requests_are_recomputed_to_the_same_answer(world: World, compiled: bool) -> None:
    """The generated tokens of a recomputed prompt must not vote."""
    engine = world.engine(compiled=compiled, num_gpu_blocks_override=least_pool(512))
    cases = [
        Case(QUESTION, PICTURES[i : i + 1], ratios, max_tokens=90)
        for i, ratios in enumerate([(0.5, 0.75), (0.25, 0.25), (0, 0), (0.9, 0.5)])
    ]
    turns = f"{QUESTION} A shape.</s>USER: And <image> this? ASSISTANT:"
    cases += [Case(turns, PICTURES[i : i + 2], (0.5, 0.5), max_tokens=90) for i in (4, 5)]
    preempted = set()

    def look(_: Any) -> None:
        for request in engine.scheduler.requests.values():
            if request.num_preemptions:
                preempted.add(request.request_id.rpartition("-")[0])

    before = engine.stats["recomputed"]
    with watched(engine, look):
        outputs = engine.generate(cases)
    pruned = [
        output.request_id
        for case, output in zip(cases, outputs, strict=True)
        if case.ratios != (0, 0)
    ]
    assert preempted & set(pruned)
    assert engine.stats["recomputed"] > before
    for case, output in zip(cases, outputs, strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)


def test_the_pool_is_full_again_after_a_thousand_requests(world: World) -> None:
    engine = world.engine()
    core = engine.llm.llm_engine
    rng = random.Random(1)
    before = free_blocks(engine)
    counted = engine.stats
    live: list[str] = []
    aborted = sent = 0
    while sent < 1000 or core.has_unfinished_requests():
        while sent < 1000 and len(live) < 24:
            num_images = rng.choice([0, 1, 1, 1, 2, 3])
            case = Case(
                "x" * rng.randrange(40)
                + rng.choice(["<image>", "<image>What? ASSISTANT: A shape."]) * num_images
                + "y" * rng.randrange(30)
                + "?",
                tuple(rng.sample(PICTURES, num_images)),
                rng.choice([None, (0, 0), (0.5, 0.75), (0.9, 0.9), (0.25, 0)]),
                max_tokens=rng.randrange(1, 6),
            )
            request_id = f"pool-{sent}"
            core.add_request(request_id, engine.prompt(case), engine.params(case))
            live.append(request_id)
            sent += 1
        if rng.random() < 0.5 and live:
            victim = live.pop(rng.randrange(len(live)))
            core.abort_request([victim])
            aborted += 1
        finished = {output.request_id for output in core.step() if output.finished}
        live = [request_id for request_id in live if request_id not in finished]
    assert aborted > 50
    assert free_blocks(engine) == before
    assert not engine.scheduler.himap_plans
    assert engine.stats["requests"]["pruned"] > counted["requests"].get("pruned", 0) + 300


@compiled_or_not
def test_abort_in_mid_decode_frees_everything(world: World, compiled: bool) -> None:
    engine = world.engine(compiled=compiled)
    core = engine.llm.llm_engine
    before = free_blocks(engine)
    case = Case(QUESTION, PICTURES[:1], (0.5, 0.75), max_tokens=200)
    core.add_request("victim", engine.prompt(case), engine.params(case))
    for _ in range(5):
        core.step()
    assert free_blocks(engine) < before
    core.abort_request(["victim"])
    core.step()
    assert free_blocks(engine) == before
    assert not engine.scheduler.himap_plans
    runner = core.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    case = Case("One more step, so that the worker hears of it.", max_tokens=2)
    engine.generate([case])
    assert not runner.himap.requests.plans


def test_generated_text_is_published_as_in_stock(world: World) -> None:
    """Also where a step needs no block, and the KV cache manager is spared most of its work."""
    cached = []
    prompt = "A text to go on with:"
    for engine in (world.engine(), world.stock()):
        engine.llm.reset_prefix_cache()
        coordinator = engine.scheduler.kv_cache_manager.coordinator
        calls = 0
        allocate = coordinator.allocate_new_blocks

        def counting(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return allocate(*args, **kwargs)

        coordinator.allocate_new_blocks = counting
        try:
            (first,) = engine.generate([Case(prompt, max_tokens=100)])
        finally:
            del coordinator.allocate_new_blocks
        if engine is world.engine():
            assert calls == 1  # for the prompt
        else:
            assert calls >= 100
        again = list(first.prompt_token_ids) + list(first.outputs[0].token_ids)
        (second,) = engine.llm.generate(
            [{"prompt_token_ids": again}], engine.params(Case("", params=WARM)), use_tqdm=False
        )
        cached.append(second.num_cached_tokens)
    assert cached[0] == cached[1] >= 96
