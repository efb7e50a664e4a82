# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs ask of the V2 adapter, played through on a CPU.

A replayed graph repeats its captured kernels on the addresses of its capture: whatever changes
from step to step must have been written there. The stand-in below does the same. It keeps the
metadata and the inputs of a capture, and its replay is an eager forward pass on exactly these.
What it can't show: that capturing succeeds, and that nothing in the real pass is slow.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from tests.checkpoints import sample_images
from tests.conftest import SHALLOW_LAYER, Case, Engine, World, assert_equals_oracle

PICTURES = tuple(sample_images(8, seed=4))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


class GraphStandIn:
    """Replaces a runner's choice of graphs and its replay.

    Attributes:
        steps: steps by graph mode.
        padded: of these, steps with padding.
        pruning: piecewise steps that pruned.
    """

    FULL_SIZES = (3, 8)

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.worker.gpu import model_runner

        core = engine.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.steps: Counter[str] = Counter()
        self.padded: Counter[str] = Counter()
        self.pruning = 0
        self.captures = {size: self._capture(size) for size in self.FULL_SIZES}
        monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", self._dispatch)
        monkeypatch.setattr(self.runner.cudagraph_manager, "run_fullgraph", self._replay)
        prepare = self.runner.model_state.prepare_attn

        def remember(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.metadata = prepare(batch, *args, **kwargs)
            self.pruning += self.runner.himap.step is not None
            for metadata in self.metadata.values():
                # A graph's attention runs for requests that only pad it, too: over nothing.
                assert not metadata.seq_lens[batch.num_reqs :].any()
            return self.metadata

        monkeypatch.setattr(self.runner.model_state, "prepare_attn", remember)
        decoder = self.runner.model.language_model.model
        boundary = torch.full((2, 512, decoder.config.hidden_size), float("nan"))
        monkeypatch.setattr(decoder, "himap_boundary", tuple(boundary))
        for index, layer in enumerate(decoder.layers):
            self._watch_cache_writes(layer.self_attn.attn, index >= SHALLOW_LAYER, monkeypatch)

    def _watch_cache_writes(
        self, attention: Any, later: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In steps that prune, later layers have no captured graph, and one slot per row."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        write = attention.impl.do_kv_cache_update

        def watched(layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
            if self.runner.himap.step is not None:
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

    def _dispatch(
        self,
        manager: Any,  # noqa: ARG002
        num_reqs: int,  # noqa: ARG002
        num_tokens: int,
        uniform_token_count: int | None,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Any, None]:
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        sizes = [size for size in self.FULL_SIZES if size >= num_tokens]
        if uniform_token_count == 1 and sizes:
            descriptor = BatchExecutionDescriptor(
                CUDAGraphMode.FULL, sizes[0], sizes[0], uniform_token_count=1
            )
        else:
            descriptor = BatchExecutionDescriptor(
                CUDAGraphMode.PIECEWISE, -(-num_tokens // 16) * 16, None
            )
        name = descriptor.cg_mode.name
        self.steps[name] += 1
        self.padded[name] += descriptor.num_tokens > num_tokens
        return descriptor, None

    def _replay(self, descriptor: Any) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        attention, inputs = self.captures[descriptor.num_tokens]
        # Of the first group of each stage.
        now = {metadata.seq_lens.data_ptr(): metadata for metadata in self.metadata.values()}
        assert len(now) == 3
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
            num_tokens=descriptor.num_tokens,
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
