# SPDX-License-Identifier: Apache-2.0
"""Every criterion against the independent implementation, and where they must differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from himap_vllm.config import EngineSettings
from himap_vllm.criteria import CRITERIA
from tests.engine import test_families
from tests.engine.test_oracle import PICTURES, PROMPTS
from tests.engines import IMAGE_TOKENS, Case, Engine
from tests.families import TINY, every_family
from tests.world import World, assert_equals_oracle

DEFAULT = EngineSettings().criterion
# HiMAP itself: tests/engine/test_oracle.py.
OTHERS = [name for name in CRITERIA if name != "himap"]
RATIOS = ((0.5, 0.75), (0.25, 0.5), (0.9, 0.0), (0.0, 0.0))
LONG_TEXT = "Words enough to be computed before the picture, in steps of their own. " * 2


def cases() -> list[Case]:
    """Every prompt at two ratio pairs, two chunked prompts, and one without a picture."""
    made = []
    for i, (prompt, num_images) in enumerate(PROMPTS.values()):
        for j in range(2):
            images = tuple(PICTURES[(i + j + k) % len(PICTURES)] for k in range(num_images))
            made.append(Case(prompt, images, RATIOS[(i + j) % len(RATIOS)], max_tokens=3))
    for prompt in (f"{LONG_TEXT}<image> What?", f"{LONG_TEXT}A <image> and B <image>"):
        made.append(Case(prompt, PICTURES[: prompt.count("<image>")], (0.5, 0.75), max_tokens=3))
    by_image = ((0.0, 0.5, 0.75), (0.0, 0.75, 0.75))
    made.append(Case(PROMPTS["two at the end"][0], PICTURES[:3], by_image, max_tokens=3))
    return [*made, Case("No picture here.", (), RATIOS[0], max_tokens=3)]


CASES = cases()


def equals_oracle(
    world: World, engine: Engine, shape: str, mixed: list[Case], criterion: str
) -> None:
    """Run the cases as one batch."""
    compared = 0
    for case, output in zip(mixed, engine.generate(mixed), strict=True):
        expected = world.oracle(shape, case, criterion)
        if min(expected.margin, expected.score_margin) < 1e-5:
            continue  # a tie within rounding: either answer is right
        assert_equals_oracle(world, engine, shape, case, output, criterion)
        compared += 1
    assert compared >= 0.8 * len(mixed)


@pytest.mark.parametrize("kv_grouping", ["balanced"])
@pytest.mark.parametrize("criterion", [*OTHERS, DEFAULT, "uniform+debiased"])
def test_one_mixed_batch_equals_the_oracle(world: World, criterion: str, kv_grouping: str) -> None:
    himap = {"criterion": criterion}
    if kv_grouping != "balanced":  # the default, with which other tests share the engine
        himap["kv_grouping"] = kv_grouping
    engine = world.engine("gqa12", himap=himap, max_num_batched_tokens=160, max_model_len=512)
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == {"many": 6, "balanced": 4}[kv_grouping]
    equals_oracle(world, engine, "gqa12", CASES, criterion)


def peak_bytes(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the most memory that tensors made meanwhile took at once."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        result = run()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    taken = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return result, most


def test_a_step_that_prunes_takes_no_more_memory_than_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM measures a step that prunes nothing, and gives what is left to the KV cache.

    Without votes: the torch form of scoring takes memory of its own, and no GPU runs it.
    """
    engine = world.engine(
        "gqa12", himap={"criterion": "uniform"}, max_num_batched_tokens=160, max_model_len=512
    )
    core = engine.llm.llm_engine.engine_core.engine_core
    decoder = core.model_executor.driver_worker.worker.model_runner.model.language_model.model
    forward = decoder.forward
    peaks: list[int] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result, most = peak_bytes(lambda: forward(*args, **kwargs))
        peaks.append(most)
        return result

    def peak(ratios: tuple[float, float]) -> int:
        engine.llm.reset_prefix_cache()
        # The runner lets the outputs of the step before go: a small one's.
        engine.generate([Case("Hello", (), None, max_tokens=1)])
        before = engine.stats["steps"]
        peaks.clear()
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "forward", recorded)
            engine.generate([Case("A" + "<image>" * 4, PICTURES[:4], ratios, max_tokens=1)])
        assert engine.stats["steps"] - before == int(any(ratios))
        (most,) = peaks
        return most

    for ratios in ((0.05, 0.0), (0.0, 0.05), (0.5, 0.75)):
        peak(ratios)  # what is made once
        index_arrays = 64 * 160  # bytes per token; a hidden state has 512
        assert 0 < peak(ratios) <= peak((0, 0)) + index_arrays


@pytest.mark.parametrize("name", ["qwen3-vl", "idefics3"])
def test_other_families(world: World, name: str) -> None:
    """Deepstack and M-RoPE; structure tokens inside an image."""
    mixed = test_families.cases(TINY[name].image)[::3]
    equals_oracle(world, world.engine(name, himap={"criterion": "mixed"}), name, mixed, "mixed")


@every_family
def test_the_default_of_every_family(world: World, name: str) -> None:
    mixed = test_families.cases(TINY[name].image)[::2]
    equals_oracle(world, world.engine(name, himap={"criterion": DEFAULT}), name, mixed, DEFAULT)


def test_the_default_where_one_token_is_left(world: World) -> None:
    """Half of one is none: attention chooses it, or the protected row is it."""
    cases = [
        Case(prompt, PICTURES[:count], (0.5, 0.99), max_tokens=2)
        for prompt, count in PROMPTS.values()
    ]
    engine = world.engine(
        "gqa12", himap={"criterion": DEFAULT}, max_num_batched_tokens=160, max_model_len=512
    )
    equals_oracle(world, engine, "gqa12", cases, DEFAULT)


def test_turns_of_the_default(world: World) -> None:
    """Three turns, each found by the next; an earlier prompt again; a prompt four times at once.

    What was pruned at other ratios is not found, but for the text before the image.
    """
    engine = world.engine("gqa12", himap={"criterion": DEFAULT})
    first = "USER: <image> What? ASSISTANT:"
    second = f"{first} It.</s>USER: And <image>? ASSISTANT:"
    texts = [first, second, f"{second} No.</s>USER: So? "]
    warm = {"skip_reading_prefix_cache": False}
    cases = [
        Case(text, PICTURES[: text.count("<image>")], (0.5, 0.75), params=warm) for text in texts
    ]
    other = Case(first, PICTURES[:1], (0.75, 0.5), params=warm)
    engine.llm.reset_prefix_cache()
    found = []
    for batch in ([cases[0]], [cases[1]], [cases[2]], [cases[1]], [other], [cases[0]] * 4):
        for case, output in zip(batch, engine.generate(batch), strict=True):
            assert_equals_oracle(world, engine, "gqa12", case, output, DEFAULT)
            found.append((output.num_cached_tokens, len(output.prompt_token_ids)))
    whole = [length for _, length in found[:3]]
    assert found[0][0] == 0
    assert found[1][0] >= whole[0]
    assert found[2][0] >= whole[1]
    assert found[3][0] == whole[1] - 1
    assert found[4][0] <= len("USER: ") + 1  # the first token begins the sequence
    assert [cached for cached, _ in found[5:]] == [whole[0] - 1] * 4


@pytest.mark.parametrize("criterion", CRITERIA)
def test_counts_are_the_same_and_repeat(world: World, criterion: str) -> None:
    """Kept counts don't depend on the criterion; the same prompt loses the same tokens again."""
    settings = {} if criterion == "himap" else {"criterion": criterion}
    engine = world.engine("gqa12", himap=settings, max_num_batched_tokens=160, max_model_len=512)
    case = Case("A: <image> B: <image>", PICTURES[:2], (0.5, 0.75), max_tokens=1)
    before = engine.stats
    kept = [engine.trace(engine.generate([case])[0].request_id) for _ in range(2)]
    assert kept[0] == kept[1]
    assert [len(image) for image in kept[0]["shallow"]] == [IMAGE_TOKENS // 2] * 2
    assert [len(image) for image in kept[0]["deep"]] == [5] * 2
    prompt_ends = len("A: ") + IMAGE_TOKENS + len(" B: ") + IMAGE_TOKENS  # after <s>
    assert kept[0]["deep"][1][-1] == prompt_ends
    assert engine.stats["steps"] == before["steps"] + 2


def test_criteria_choose_differently(world: World) -> None:
    case = Case("USER: <image>\nWhat is this? ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=1)
    chosen = {}
    for criterion in CRITERIA:
        settings = {} if criterion == "himap" else {"criterion": criterion}
        engine = world.engine(
            "gqa12", himap=settings, max_num_batched_tokens=160, max_model_len=512
        )
        chosen[criterion] = tuple(engine.trace(engine.generate([case])[0].request_id)["deep"][0])
    assert len(set(chosen.values())) == len(CRITERIA)
