# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints that vLLM's CPU build runs are pruned like others.

The 4-bit formats run in float16, which their kernels want and which keeps activations as they are.
W8A8 runs in bfloat16: with AMX vLLM's int8 kernel has no other (see `test_stocks_int8_in_float16`).

Kernels depend on the processor, and one that does not suit it may abort. So engines run in
processes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm._custom_ops  # noqa: F401 - loads the kernels

from tests import isolated
from tests.checkpoints import sample_images
from tests.engines import DEEP_LAYER, GROUPING, IMAGE_TOKENS, SHALLOW_LAYER, Case, Engine
from tests.oracle import Oracle, OracleResult
from tests.quantised import FORMATS, quantise
from tests.world import World

PICTURES = tuple(sample_images(4))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
PRUNED = [
    Case(QUESTION, PICTURES[2:3], (0.25, 0.5)),
    Case(QUESTION, PICTURES[1:2], (0.5, 0.75)),
    Case(QUESTION, PICTURES[3:4], (0.75, 0.25)),
    Case("USER: <image>\n<image>\nCompare. ASSISTANT:", PICTURES[:2], (0.5, 0.5)),
]
WHOLE = [
    Case(QUESTION, PICTURES[:1], (0, 0), max_tokens=20),
    Case("No picture at all. Go on:", (), max_tokens=20),
]
# What float16 costs: the dequantised weights themselves, run in float16 by the same engine, give
# log-probabilities up to 0.016 from the oracle's, which computes in float32.
LOGPROB_TOLERANCE = 0.04
CLEAR_CHOICE = 1e-3  # a gap between scores, of around 0.3, that float16 does not close


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: of the answer.
        logprobs: one for each.
    """

    prompt_tokens: int
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Served:
    """What engines gave on a quantised checkpoint.

    Attributes:
        stock: `WHOLE` from vLLM without the plugin.
        whole: `WHOLE` from the pruning engine.
        pruned: `PRUNED` from the same, as one batch with `WHOLE`.
        traces: positions that survived in each of `PRUNED`.
        held: KV blocks of `PRUNED`, all groups together.
    """

    stock: list[Said]
    whole: list[Said]
    pruned: list[Said]
    traces: list[dict[str, list[list[int]]]]
    held: int


@dataclass(frozen=True)
class Answers:
    """What engines gave, and the oracle's answers to `PRUNED` on the dequantised weights."""

    served: Served
    expected: list[OracleResult]


def _said(output: Any) -> Said:
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    pairs = zip(completion.logprobs, tokens, strict=True)
    return Said(
        len(output.prompt_token_ids), tokens, [step[token].logprob for step, token in pairs]
    )


def ask_stock(checkpoint: Path, dtype: str) -> list[Said]:
    """`WHOLE`, without the plugin's pruning."""
    return list(map(_said, Engine(checkpoint, None, {"dtype": dtype}).generate(WHOLE)))


def serve(checkpoint: Path, dtype: str) -> Served:
    """All that is asked of engines."""
    stock = ask_stock(checkpoint, dtype)
    cuts = {"shallow_layer": SHALLOW_LAYER, "deep_layer": DEEP_LAYER}
    himap = {**cuts, "trace_requests": 64, "criterion": "himap"}
    engine = Engine(checkpoint, himap, {"dtype": dtype})
    whole = engine.generate(WHOLE)  # in stock's batches: how kernels round depends on their shape
    pruned = engine.generate([*PRUNED, *WHOLE])[: len(PRUNED)]
    return Served(
        stock=stock,
        whole=list(map(_said, whole)),
        pruned=list(map(_said, pruned)),
        traces=[engine.trace(output.request_id) for output in pruned],
        held=engine.stats["kv_blocks"],
    )


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    directory: Path = tmp_path_factory.mktemp(request.param)
    target, rounded = directory / "quantised", directory / "rounded"
    form = FORMATS[request.param]
    quantise(world.checkpoint("mha12"), form, target, rounded)
    served = isolated.call(serve, target, "bfloat16" if form.activations else "float16")
    oracle = Oracle(rounded, SHALLOW_LAYER, DEEP_LAYER)
    return Answers(
        served=served,
        expected=[
            oracle.generate(case.prompt, case.images, shallow, deep, case.max_tokens)
            for case in PRUNED
            for shallow, deep in [case.ratios or (0, 0)]
        ],
    )


# vLLM's library for AVX2 has no kernel for 4-bit weights: see `test_stocks_4_bit_formats`.
HAS_4_BIT = hasattr(torch.ops._C, "cpu_gemm_wna16")
FOUR_BIT = [name for name, form in FORMATS.items() if not form.activations]
every_format = pytest.mark.parametrize(
    "answers", [name for name in FORMATS if HAS_4_BIT or name not in FOUR_BIT], indirect=True
)
exact_inputs = pytest.mark.parametrize("answers", FOUR_BIT if HAS_4_BIT else [], indirect=True)


@every_format
def test_ratio_zero_equals_stock(answers: Answers) -> None:
    for ours, theirs in zip(answers.served.whole, answers.served.stock, strict=True):
        assert ours.tokens == theirs.tokens


@every_format
def test_as_many_tokens_and_blocks_as_planned(answers: Answers) -> None:
    blocks = 0
    for case, said, trace in zip(PRUNED, answers.served.pruned, answers.served.traces, strict=True):
        shallow, deep = case.ratios or (0, 0)
        between = IMAGE_TOKENS - int(IMAGE_TOKENS * shallow)
        after = between - int(between * deep)
        assert [len(image) for image in trace["shallow"]] == [between] * len(case.images)
        assert [len(image) for image in trace["deep"]] == [after] * len(case.images)
        for stage, kept in enumerate((IMAGE_TOKENS, between, after)):
            tokens = said.prompt_tokens - (IMAGE_TOKENS - kept) * len(case.images)
            blocks += -(-tokens // GROUPING.block_sizes[stage]) * GROUPING.parts[stage]
    assert answers.served.held == blocks


@exact_inputs
def test_pruned_prompts_equal_the_oracle_on_the_dequantised_weights(answers: Answers) -> None:
    served = answers.served
    for said, trace, expected in zip(served.pruned, served.traces, answers.expected, strict=True):
        assert expected.score_margin > CLEAR_CHOICE
        assert trace == {"shallow": expected.kept_shallow, "deep": expected.kept_deep}
        for step, (token, logprob) in enumerate(zip(said.tokens, said.logprobs, strict=True)):
            reference = expected.all_logprobs[step]
            assert logprob == pytest.approx(float(reference[token]), abs=LOGPROB_TOLERANCE)
            if token != expected.tokens[step]:  # a tie within rounding; another text from here on
                assert reference.max() - reference[token] < 2 * LOGPROB_TOLERANCE
                break


@every_format
def test_the_same_tokens_matter_as_to_the_dequantised_weights(answers: Answers) -> None:
    """Holds where activations are rounded to 8 bits, too, if not to the last token."""
    for cut, least in (("shallow", 0.9), ("deep", 0.75)):
        ours = [set(image) for trace in answers.served.traces for image in trace[cut]]
        theirs = [
            set(image) for result in answers.expected for image in getattr(result, f"kept_{cut}")
        ]
        shared = sum(len(a & b) for a, b in zip(ours, theirs, strict=True))
        assert shared >= least * sum(map(len, theirs))


def test_stocks_int8_in_float16(world: World, tmp_path: Path) -> None:
    """vLLM's int8 kernel for AMX takes float16 and aborts at the first step, with any shape.

    Without AMX vLLM chooses another one, which answers. This fails once vLLM has mended its own.
    """
    target = tmp_path / "quantised"
    quantise(world.checkpoint("mha12"), FORMATS["w8a8-int8"], target, tmp_path / "rounded")
    outcome = isolated.attempt(ask_stock, target, "float16")
    if torch.cpu._is_amx_tile_supported():
        assert outcome.signal == "SIGABRT"
        assert "scalar path not implemented" in outcome.words
    else:
        assert outcome.status == 0, outcome.words
        assert [len(said.tokens) for said in outcome.value] == [20, 20]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_stocks_4_bit_formats(world: World, tmp_path: Path, name: str) -> None:
    """Where vLLM's library lacks their kernel, stock vLLM fails at the first step."""
    target = tmp_path / "quantised"
    quantise(world.checkpoint("mha12"), FORMATS[name], target, tmp_path / "rounded")
    outcome = isolated.attempt(ask_stock, target, "float16")
    if HAS_4_BIT:
        assert outcome.status == 0, outcome.words
    else:
        assert outcome.status == 1
        assert "no attribute 'cpu_gemm_wna16'" in outcome.words
