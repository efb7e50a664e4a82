# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs ask of the V2 adapter, played through on a CPU.

A replayed graph repeats its captured kernels on the addresses of its capture: whatever changes
from step to step must have been written there. The stand-in below does the same. It keeps the
metadata and the inputs of a capture, and its replay is an eager forward pass on exactly these.
Which graph a step gets is decided by vLLM's own code.
What it can't show: that capturing succeeds, and that nothing in the real pass is slow.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.checkpoints import sample_images
from tests.conftest import SHALLOW_LAYER, Case, Engine, World, assert_equals_oracle

PICTURES = tuple(sample_images(8, seed=4))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


class GraphStandIn:
    """Lets vLLM choose graphs as on a GPU, and replaces their replay.

    Attributes:
        chosen: vLLM's choice for each step.
        steps: steps by graph mode.
        padded: of these, steps with padding.
        replayed: full graphs, in order.
        pruning: piecewise steps that pruned.
    """

    CAPTURE_SIZES = (3, 8, *range(16, 513, 16))  # full graphs for batches of 3, 8 and 16 requests

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        core = engine.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.himap = getattr(self.runner, "himap", None)  # not in a stock engine
        self.chosen: list[Any] = []
        self.steps: Counter[str] = Counter()
        self.padded: Counter[str] = Counter()
        self.replayed: list[Any] = []
        self.pruning = 0
        full = self._have_graphs(monkeypatch)
        self.captures = {graph: self._capture(graph.num_tokens) for graph in full}
        prepare = self.runner.model_state.prepare_attn

        def remember(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.metadata = prepare(batch, *args, **kwargs)
            self.pruning += self._prunes
            for metadata in self.metadata.values():
                # A graph's attention runs for requests that only pad it, too: over nothing.
                assert not metadata.seq_lens[batch.num_reqs :].any()
            return self.metadata

        monkeypatch.setattr(self.runner.model_state, "prepare_attn", remember)
        if self.himap is None:
            return
        decoder = self.runner.model.language_model.model
        boundary = torch.full((2, 512, decoder.config.hidden_size), float("nan"))
        monkeypatch.setattr(decoder, "himap_boundary", tuple(boundary))
        for index, layer in enumerate(decoder.layers):
            self._watch_cache_writes(layer.self_attn.attn, index >= SHALLOW_LAYER, monkeypatch)

    @property
    def _prunes(self) -> bool:
        return self.himap is not None and self.himap.step is not None

    def _have_graphs(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """As if vLLM had captured them in its default mode on GPUs.

        Returns:
            The full ones.
        """
        from vllm.config import CUDAGraphMode

        manager = self.runner.cudagraph_manager
        compilation = manager.compilation_config
        monkeypatch.setattr(compilation, "cudagraph_capture_sizes", [*self.CAPTURE_SIZES])
        monkeypatch.setattr(compilation, "max_cudagraph_capture_size", self.CAPTURE_SIZES[-1])
        monkeypatch.setattr(manager, "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
        monkeypatch.setattr(manager, "_candidates", {})
        monkeypatch.setattr(manager, "_capture_descs", {})
        monkeypatch.setattr(manager, "_graphs_captured", True)
        manager._init_candidates()
        dispatch = manager.dispatch

        def dispatching(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            graph = dispatch(num_reqs, num_tokens, *args, **kwargs)
            self.chosen.append(graph)
            self.steps[graph.cg_mode.name] += 1
            self.padded[graph.cg_mode.name] += graph.num_tokens > num_tokens
            return graph

        monkeypatch.setattr(manager, "dispatch", dispatching)
        monkeypatch.setattr(manager, "run_fullgraph", self._replay)
        full: list[Any] = manager._capture_descs[CUDAGraphMode.FULL]
        return full

    def _watch_cache_writes(
        self, attention: Any, later: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In steps that prune, later layers have no captured graph, and one slot per row."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        write = attention.impl.do_kv_cache_update

        def watched(layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
            if self._prunes:
                mode = CUDAGraphMode.NONE if later else CUDAGraphMode.PIECEWISE
                assert get_forward_context().cudagraph_runtime_mode == mode
                assert len(slots) == len(key)
            write(layer, key, value, kv_cache, slots)

        monkeypatch.setattr(attention.impl, "do_kv_cache_update", watched)

    def _capture(self, size: int) -> tuple[Any, dict[str, Any]]:
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        runner = self.runner
        attention = prepare_inputs_to_capture(
            size,
            size,
            runner.model_state,
            runner.input_buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=True,
            max_query_len=1,
        )
        inputs = {
            "input_ids": None,
            "positions": runner.input_buffers.positions[:size],
            "intermediate_tensors": None,
            **runner.model_state.prepare_dummy_inputs(size, size),
        }
        return attention, inputs

    def _replay(self, graph: Any) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        self.replayed.append(graph)
        attention, inputs = self.captures[graph]
        # Of the first group of each stage.
        now = {metadata.seq_lens.data_ptr(): metadata for metadata in self.metadata.values()}
        assert len(now) == (1 if self.himap is None else 3)
        captured = {}
        for name, metadata in attention.attn_metadata.items():
            built = now[metadata.seq_lens.data_ptr()]
            assert built.query_start_loc.data_ptr() == metadata.query_start_loc.data_ptr()
            captured[name] = copy.copy(metadata)
            # The CPU kernel's work list, which FlashAttention keeps in a tensor of its builder.
            captured[name].scheduler_metadata = built.scheduler_metadata
        with set_forward_context(
            captured,
            self.runner.vllm_config,
            num_tokens=graph.num_tokens,
            slot_mapping=attention.slot_mappings,
        ):
            hidden_states: torch.Tensor = self.runner.model(**inputs)
        return hidden_states


def test_replayed_and_padded_steps_equal_the_oracle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.engine()
    ratios = [(0.5, 0.75), (0, 0), (0.9, 0.5), (0.25, 0.25), (0.0, 0.5)]
    cases = [
        Case(QUESTION + "?" * i, PICTURES[i : i + 1], pair, max_tokens=5 + i)
        for i, pair in enumerate(ratios)
    ]
    cases.append(Case("Words, no picture.", (), None, max_tokens=9))
    later = [Case("Two: <image> and <image>.", PICTURES[5:7], (0.5, 0.5), max_tokens=4)]
    graphs = GraphStandIn(engine, monkeypatch)
    for batch in (cases, later, cases[3:]):
        for case, output in zip(batch, engine.generate(batch), strict=True):
            assert_equals_oracle(world, engine, "mha12", case, output)
    assert graphs.padded["FULL"] > 5
    assert graphs.steps["FULL"] > graphs.padded["FULL"]
    assert graphs.padded["PIECEWISE"] >= graphs.pruning > 2


def test_unplanned_batches_replay_the_same_graphs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later stages' lengths are where the capture left them, with plans and without."""
    engine = world.engine()
    cases = [Case(QUESTION, PICTURES[:1], (0, 0)), Case("Only words.", (), None)]
    graphs = GraphStandIn(engine, monkeypatch)
    for case, output in zip(cases, engine.generate(cases), strict=True):
        assert_equals_oracle(world, engine, "mha12", case, output)
    assert graphs.padded["FULL"] >= 5
    assert graphs.pruning == 0


def test_decoding_replays_the_graphs_that_stock_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step for step, whether requests are pruned or not."""
    ratios = [(0.5, 0.75), (0, 0), (0.9, 0.5), None]
    cases = [
        Case(QUESTION, PICTURES[i : i + 1], pair, max_tokens=4 + 3 * i)
        for i, pair in enumerate(ratios)
    ]
    unpruned = [replace(case, ratios=None) for case in cases]
    runs = []
    for engine, batch in ((world.stock(), unpruned), (world.engine(), cases)):
        engine.llm.reset_prefix_cache()  # the other tests' prompts
        with monkeypatch.context() as patch:
            runs.append(GraphStandIn(engine, patch))
            engine.generate(batch)
    stock, graphs = runs
    assert graphs.captures.keys() == stock.captures.keys()
    assert graphs.pruning > 0
    assert graphs.chosen == stock.chosen
    assert graphs.replayed == stock.replayed
    # All but the last of the longest answer's tokens come from decode steps, and each replays one.
    assert len(graphs.replayed) == graphs.steps["FULL"] >= cases[-1].max_tokens - 1
    assert {graph.num_reqs for graph in graphs.replayed} == {3, 8}


def test_groups_of_a_stage_share_their_metadata(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once per stage, 12 layers in 6 groups; once where the stages don't differ."""
    engine = world.engine()
    graphs = GraphStandIn(engine, monkeypatch)
    built: list[int] = []
    for groups in graphs.runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()
            build = builder.build

            def counting(*args: Any, _build: Any = build, **kwargs: Any) -> Any:
                built.append(1)
                return _build(*args, **kwargs)

            monkeypatch.setattr(builder, "build", counting)
    assert len(graphs.runner.attn_groups) == 6
    engine.generate([Case(QUESTION, PICTURES[:1], (0.5, 0.75))])
    assert len(built) == 3 * graphs.steps.total()
    built.clear()
    graphs.steps.clear()
    engine.generate([Case(QUESTION, PICTURES[:1], (0, 0)), Case("Words.", (), None)])
    assert graphs.steps["FULL"] > 0 < graphs.steps["PIECEWISE"]
    assert len(built) == 3 * graphs.steps["FULL"] + graphs.steps["PIECEWISE"]
    for attention, _ in graphs.captures.values():
        addresses = {
            (metadata.block_table.data_ptr(), metadata.slot_mapping.data_ptr())
            for metadata in attention.attn_metadata.values()
        }
        assert len(attention.attn_metadata) == 12
        assert len(addresses) == 6
