# SPDX-License-Identifier: Apache-2.0
"""What torch.compile in pieces and CUDA graphs ask of the V2 adapter; see `cuda_graphs`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.checkpoints import sample_images
from tests.engine.test_compilation import compilations
from tests.engines import DEEP_LAYER, GROUPING, SHALLOW_LAYER, Case
from tests.interpreted.cuda_graphs import CAPTURE_SIZES, GraphPiece, Played
from tests.world import World, assert_equals_oracle

NUM_LAYERS = 12
PICTURES = tuple(sample_images(8, seed=4))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def played(world: World) -> Played:
    return Played(world.engine(compiled=True))


@pytest.fixture(autouse=True)
def _begin_anew(played: Played) -> None:
    played.forget()


def assert_equal_oracle(world: World, played: Played, cases: list[Case]) -> None:
    for case, output in zip(cases, played.engine.generate(cases), strict=True):
        assert_equals_oracle(world, played.engine, "mha12", case, output)


def pieces(played: Played) -> int:
    """Captured pieces that the steps must have replayed: between, before and behind attention."""
    layers = (SHALLOW_LAYER, DEEP_LAYER - SHALLOW_LAYER, NUM_LAYERS - DEEP_LAYER)
    return sum(count * (layers[stage] + 1) for stage, count in played.stages.items())


def test_everything_is_compiled_and_captured(played: Played) -> None:
    config = played.runner.compilation_config
    assert config.mode.name == "VLLM_COMPILE"
    assert config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
    assert "vllm::unified_attention_with_output" in config.splitting_ops
    own = GraphPiece.of(played.runner)
    assert len({piece.module for piece in own}) == 3
    assert len(own) == NUM_LAYERS + 3
    assert all(piece.num_captures == len(CAPTURE_SIZES) for piece in own)
    assert [graph.num_tokens for graph in played.full_graphs] == [16, 8, 3]


def test_replayed_and_padded_steps_equal_the_oracle(world: World, played: Played) -> None:
    ratios = [(0.5, 0.75), (0, 0), (0.9, 0.5), (0.25, 0.25), (0.0, 0.5)]
    cases = [
        Case(QUESTION + "?" * i, PICTURES[i : i + 1], pair, max_tokens=5 + i)
        for i, pair in enumerate(ratios)
    ]
    cases.append(Case("Words, no picture.", (), None, max_tokens=9))
    later = [Case("Two: <image> and <image>.", PICTURES[5:7], (0.5, 0.5), max_tokens=4)]
    large = [Case("Three: <image> <image>, <image>!", PICTURES[:3], (0.75, 0.5)) for _ in range(3)]
    before, replays = compilations(), GraphPiece.replays
    for batch in (cases, later, cases[3:], large):
        assert_equal_oracle(world, played, batch)
    assert compilations() == before
    # Behind the cuts, too, in graphs of their own sizes, and where the step is larger than any.
    assert played.pruning["NONE"] > 0
    assert played.stages[0] == played.pruning["PIECEWISE"]
    assert played.stages[0] < played.stages[1] <= played.stages[2]
    assert played.padded_stages > 2
    assert GraphPiece.replays == replays + pieces(played)
    assert played.padded["FULL"] > 5
    assert played.steps["FULL"] > played.padded["FULL"]
    assert played.padded["PIECEWISE"] >= played.pruning["PIECEWISE"] > 1


def test_unplanned_batches_replay_the_same_graphs(world: World, played: Played) -> None:
    """The later stages' lengths are where the capture left them, with plans and without."""
    cases = [Case(QUESTION, PICTURES[:1], (0, 0)), Case("Only words.", (), None)]
    replays = GraphPiece.replays
    assert_equal_oracle(world, played, cases)
    assert played.padded["FULL"] >= 5
    assert not played.pruning.total()
    assert (
        GraphPiece.replays
        == replays + pieces(played)
        == replays + (NUM_LAYERS + 3) * played.steps["PIECEWISE"]
    )


def test_decoding_replays_the_graphs_that_stock_does(world: World, played: Played) -> None:
    """Step for step, whether requests are pruned or not."""
    ratios = [(0.5, 0.75), (0, 0), (0.9, 0.5), None]
    cases = [
        Case(QUESTION, PICTURES[i : i + 1], pair, max_tokens=4 + 3 * i)
        for i, pair in enumerate(ratios)
    ]
    played.engine.generate(cases)
    stock = Played(world.stock(compiled=True))
    stock.engine.generate([replace(case, ratios=None) for case in cases])
    assert played.full_graphs.keys() == stock.full_graphs.keys()
    assert played.pruning.total() > 0
    assert played.chosen == stock.chosen
    assert played.replayed == stock.replayed
    # All but the first of the longest answer's tokens come from decode steps; each replays one.
    assert len(played.replayed) == played.steps["FULL"] >= cases[-1].max_tokens - 1
    assert {graph.num_reqs for graph in played.replayed} == {3, 8}


def test_groups_of_a_stage_share_their_metadata(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once per stage."""
    built: list[int] = []
    for groups in played.runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()
            build = builder.build

            def counting(*args: Any, _build: Any = build, **kwargs: Any) -> Any:
                built.append(1)
                return _build(*args, **kwargs)

            monkeypatch.setattr(builder, "build", counting)
    assert len(played.runner.attn_groups) == GROUPING.num_groups
    played.engine.generate([Case(QUESTION, PICTURES[:1], (0.5, 0.75))])
    assert len(built) == 3 * played.steps.total()
    built.clear()
    played.forget()
    played.engine.generate([Case(QUESTION, PICTURES[:1], (0, 0)), Case("Words.", (), None)])
    assert played.steps["FULL"] > 0 < played.steps["PIECEWISE"]
    assert len(built) == 3 * played.steps.total()
    for graph in played.full_graphs.values():
        captured = graph.attention.attn_metadata
        addresses = {
            (metadata.block_table.data_ptr(), metadata.slot_mapping.data_ptr())
            for metadata in captured.values()
        }
        assert len(captured) == 12
        assert len(addresses) == GROUPING.num_groups
