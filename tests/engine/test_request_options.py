# SPDX-License-Identifier: Apache-2.0
"""What requests ask for beside pruning, what is refused, and what the counters say of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints import IMAGE_ID, sample_images
from tests.engines import GROUPING, Case
from tests.world import World, assert_equals_oracle, compiled_or_not

PICTURES = tuple(sample_images(8, seed=1))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


@compiled_or_not
def test_several_answers_stop_strings_and_logprobs(world: World, compiled: bool) -> None:
    engine = world.engine(compiled=compiled)
    greedy = Case(QUESTION, PICTURES[:1], (0.5, 0.75), max_tokens=30)
    warm = {"temperature": 1.0, "seed": 7}
    # vLLM seeds the i-th of n answers with seed + i.
    alone = [
        Case(QUESTION, PICTURES[:1], (0.5, 0.75), 30, {**warm, "seed": 7 + i}) for i in (0, 1, 2)
    ]
    reference, *separate = engine.generate([greedy, *alone])
    text = reference.outputs[0].text
    stop = text[8:10]

    several = Case(QUESTION, PICTURES[:1], (0.5, 0.75), 30, {**warm, "n": 3})
    stopping = Case(QUESTION, PICTURES[:1], (0.5, 0.75), 30, {"stop": [stop]})
    ranked = Case(QUESTION, PICTURES[:1], (0.5, 0.75), 4, {"logprobs": 5})
    outputs = engine.generate([several, stopping, ranked])
    texts = [completion.text for completion in outputs[0].outputs]
    assert texts == [output.outputs[0].text for output in separate]
    assert len(set(texts)) == 3
    assert outputs[1].outputs[0].text == text[: text.index(stop)]
    assert outputs[1].outputs[0].finish_reason == "stop"
    expected = world.oracle("mha12", ranked).all_logprobs
    for step, row in zip(outputs[2].outputs[0].logprobs, expected, strict=True):
        assert len(step) >= 5
        for token, entry in step.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=2e-3)


@compiled_or_not
def test_prompt_logprobs_and_pruning_exclude_each_other(world: World, compiled: bool) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = world.engine(compiled=compiled)
    ask = {"prompt_logprobs": 1}
    with pytest.raises(VLLMValidationError, match="can't be combined with pruning") as error:
        engine.generate([Case(QUESTION, PICTURES[:1], (0.5, 0.5), params=ask)])
    assert error.value.parameter == "prompt_logprobs"
    before = engine.stats["requests"].get("bypassed_prompt_logprobs", 0)
    case = Case(QUESTION, PICTURES[:1], None, params=ask)
    (ours,), (theirs,) = engine.generate([case]), world.stock(compiled=compiled).generate([case])
    assert engine.stats["requests"]["bypassed_prompt_logprobs"] == before + 1
    assert len(ours.prompt_logprobs) == len(ours.prompt_token_ids)
    for mine, stock in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
        assert mine.keys() == stock.keys()
    # Text-only prompts have nothing to prune: no conflict.
    (output,) = engine.generate([Case("Only words.", (), (0.5, 0.5), params=ask)])
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


@pytest.mark.parametrize(
    ("args", "parameter"),
    [
        ({"himap_shallow_ratio": -0.5}, "himap_shallow_ratio"),
        ({"himap_shallow_ratio": 1}, "himap_shallow_ratio"),
        ({"himap_deep_ratio": float("nan")}, "himap_deep_ratio"),
        ({"himap_deep_ratio": "a lot"}, "himap_deep_ratio"),
        ({"himap_layers": 3}, "himap_layers"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives(
    world: World, args: dict[str, Any], parameter: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = world.engine()
    with pytest.raises(VLLMValidationError) as error:
        engine.generate([Case(QUESTION, PICTURES[:1], params={"extra_args": args})])
    assert error.value.parameter == parameter
    case = Case(QUESTION, PICTURES[:1], (0.5, 0.75))
    (output,) = engine.generate([case])
    assert_equals_oracle(world, engine, "mha12", case, output)


def test_counters_tell_what_was_done(world: World) -> None:
    engine = world.engine()
    before = engine.stats
    cases = [
        Case(QUESTION, PICTURES[:1], (0.5, 0.75)),
        Case("<image><image> Compare.", PICTURES[:2], (0.25, 0.5)),
        Case(QUESTION, PICTURES[:1], (0, 0)),
        Case("Only words.", (), (0.5, 0.5)),
    ]
    outputs = engine.generate(cases)
    after = engine.stats
    change = {key: after[key] - before[key] for key in after if key != "requests"}
    assert change["image_tokens"] == 36 * 3
    assert change["image_tokens_kept_shallow"] == 18 + 2 * 27
    assert change["image_tokens_kept_deep"] == 5 + 2 * 14
    assert after["requests"]["pruned"] - before["requests"].get("pruned", 0) == 2
    assert after["requests"]["unpruned"] - before["requests"].get("unpruned", 0) == 1
    blocks = saved = 0
    for case, output in list(zip(cases, outputs, strict=True))[:2]:
        trace = engine.trace(output.request_id)
        for stage, kept in ((0, None), (1, trace["shallow"]), (2, trace["deep"])):
            gone = 0 if kept is None else 36 * len(case.images) - sum(map(len, kept))
            size, groups = GROUPING.block_sizes[stage], GROUPING.parts[stage]
            full = -(-len(output.prompt_token_ids) // size)
            held = -(-(len(output.prompt_token_ids) - gone) // size)
            blocks += held * groups
            saved += (full - held) * groups
    assert change["kv_blocks"] == blocks
    assert change["kv_blocks_saved"] == saved > 0
    kv_bytes = GROUPING.page * 2 * 4 * 32 * 4  # k and v, heads, head size, float32
    assert change["kv_bytes_saved"] == saved * kv_bytes
    assert change["steps"] >= 1
    assert change["pruning_seconds"] > 0


def test_traces_by_name(world: World) -> None:
    """What survived of requests that ask for it: as the engine's own log has it."""
    engine = world.engine()
    ratios = {"himap_shallow_ratio": 0.5, "himap_deep_ratio": [0.75, 0], "himap_trace": "two"}
    one = {"himap_shallow_ratio": 0.25, "himap_deep_ratio": 0.5, "himap_trace": "one"}
    none = {"himap_shallow_ratio": 0, "himap_deep_ratio": 0, "himap_trace": "unpruned"}
    cases = [
        Case("Two: <image> <image>?", PICTURES[:2], params={"extra_args": ratios}),
        Case(QUESTION, PICTURES[2:3], (0.5, 0.5)),
        Case(QUESTION, PICTURES[3:4], params={"extra_args": one, "n": 2, "temperature": 1}),
        Case(QUESTION, PICTURES[3:4], params={"extra_args": none}),
    ]
    outputs = engine.generate(cases)
    for name, output, counts in (
        ("two", outputs[0], [[18, 18], [5, 18]]),
        ("one", outputs[2], [[27], [14]]),
    ):
        found = engine.llm.collective_rpc("himap_take_trace", args=(name,))[0]
        assert [[len(image) for image in cut] for cut in found["kept"]] == counts
        ids = output.prompt_token_ids
        places = [place for place, token in enumerate(ids) if token == IMAGE_ID]
        images = [places[at : at + 36] for at in range(0, len(places), 36)]
        if name == "two":
            logged = engine.trace(output.request_id)
            for key, kept in zip(("shallow", "deep"), found["kept"], strict=True):
                of_images = zip(images, kept, strict=True)
                assert [[image[i] for i in own] for image, own in of_images] == logged[key]
        for cut in range(2):
            for index in range(len(images)):
                scores, left = found["scores"][cut][index], found["kept"][cut][index]
                came = range(36) if cut == 0 else found["kept"][0][index]
                assert [i for i, score in enumerate(scores) if score is not None] == list(came)
                lowest = min(scores[i] for i in left)
                assert all(scores[i] <= lowest for i in came if i not in left)
        assert engine.llm.collective_rpc("himap_take_trace", args=(name,)) == [None]  # taken
    assert engine.llm.collective_rpc("himap_take_trace", args=("unpruned",)) == [None]


def test_traces_of_images_that_keep_all_and_of_a_name_that_comes_again(world: World) -> None:
    engine = world.engine()
    again = {"himap_shallow_ratio": 0.5, "himap_deep_ratio": 0.75, "himap_trace": "again"}
    apart = {"himap_shallow_ratio": [0, 0.5], "himap_deep_ratio": 0, "himap_trace": "again"}
    turns = "USER: <image>\nOne? ASSISTANT: yes</s>USER: <image>\nTwo? ASSISTANT:"
    engine.generate(
        [
            Case(QUESTION, PICTURES[:1], params={"extra_args": again}),
            Case(turns, PICTURES[:2], params={"extra_args": apart}),
        ]
    )
    (found,) = engine.llm.collective_rpc("himap_take_trace", args=("again", False))
    assert [[own and len(own) for own in cut] for cut in found["kept"]] == [[None, 18]] * 2
    assert found["scores"] == [[], []]


@pytest.mark.parametrize("name", ["", "x" * 65, 1, True])
def test_a_name_of_a_trace_that_is_refused(world: World, name: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    case = Case(QUESTION, PICTURES[:1], params={"extra_args": {"himap_trace": name}})
    with pytest.raises(VLLMValidationError, match="1 to 64 characters") as error:
        world.engine().generate([case])
    assert error.value.parameter == "himap_trace"


def test_the_callers_parameters_stay_untouched(world: World) -> None:
    engine = world.engine()
    case = Case(QUESTION, PICTURES[:1], (0.5, 0.75))
    params = engine.params(case)
    for _ in range(2):
        engine.llm.generate([engine.prompt(case)], params, use_tqdm=False)
    assert params.extra_args == {"himap_shallow_ratio": 0.5, "himap_deep_ratio": 0.75}
