# SPDX-License-Identifier: Apache-2.0
"""vLLM's path on GPUs, compiled and with CUDA graphs, played through on a CPU.

vLLM's own code configures, traces, splits, captures and chooses graphs (`FULL_AND_PIECEWISE`).
Pieces run as they were traced, without Inductor, and graphs are stand-ins. A CUDA graph repeats its
kernels on the addresses of its capture, so a stand-in repeats its call on the arguments of its
capture; and what a graph returns lies in memory that all graphs share, so a stand-in ruins what
others have returned. What this can't show: that CUDA accepts the captures, that kernels and
Inductor's code are right on a GPU, and how long anything takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.engines import Engine

# Full graphs for batches of up to 16, the engine's limit; piecewise ones for steps of half its
# limit, so that there are larger ones, of which later stages may fit a graph.
CAPTURE_SIZES = [3, 8, 16, 64, 128, 192, 256]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _addresses(values: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(values)]


@dataclass
class _Captured:
    args: tuple[Any, ...]
    output: Any

    def ruin(self) -> None:
        """Overwrite what was returned, but for what was also passed."""
        passed = {tensor.untyped_storage().data_ptr() for tensor in _tensors(self.args)}
        for tensor in _tensors(self.output):
            if tensor.untyped_storage().data_ptr() not in passed:
                tensor.fill_(float("nan"))


class GraphPiece:
    """Stands for vLLM's `CUDAGraphWrapper` around one piece of a compiled module.

    Attributes:
        pieces: all that there are.
        modules: compiled modules that they are pieces of.
        replays: that were replayed.
    """

    pieces: list[GraphPiece] = []  # noqa: RUF012
    modules = 0
    replays = 0

    def __init__(
        self, runnable: Any, vllm_config: Any, runtime_mode: Any, cudagraph_options: Any
    ) -> None:
        self.runnable = runnable
        self._config, self._mode = vllm_config, runtime_mode
        GraphPiece.modules += cudagraph_options.debug_log_enable  # vLLM logs the first piece only
        self.module = GraphPiece.modules
        self._kept = not cudagraph_options.weak_ref_output
        self._captured: dict[Any, _Captured] = {}
        GraphPiece.pieces.append(self)

    @staticmethod
    def of(runner: Any) -> list[GraphPiece]:
        """Those of one model runner."""
        layers = runner.compilation_config.static_forward_context
        return [
            piece
            for piece in GraphPiece.pieces
            # Its language model has a configuration of its own, with the runner's inside.
            if piece._config.compilation_config.static_forward_context is layers
        ]

    @property
    def num_captures(self) -> int:
        """Sizes that it was captured for."""
        return len(self._captured)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runnable, name)

    def __call__(self, *args: Any) -> Any:
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if not is_forward_context_available():
            return self.runnable(*args)
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self._mode:
            return self.runnable(*args)
        size = context.batch_descriptor
        self._use_memory(size)
        captured = self._captured.get(size)
        if captured is None:
            output = self.runnable(*args)
            self._captured[size] = _Captured(args, output)
            return output
        GraphPiece.replays += 1
        assert _addresses(args) == _addresses(captured.args)
        again = _tensors(self.runnable(*captured.args))
        for tensor, value in zip(_tensors(captured.output), again, strict=True):
            tensor.copy_(value)
        return captured.output

    def _use_memory(self, size: Any) -> None:
        """Outputs are kept for the pieces of the same module, if at all, and size."""
        for piece in GraphPiece.pieces:
            if piece._config is not self._config:
                continue  # another engine's
            kept = piece is self or (piece._kept and piece.module == self.module)
            for other, captured in piece._captured.items():
                if other != size or not kept:
                    captured.ruin()


class Graph:
    """Stands for `torch.cuda.CUDAGraph`, of a whole forward pass."""

    of_this_step: dict[str, Any]  # attention metadata by layer

    def __init__(self) -> None:
        self.forward, self.attention = _Capturing.forward, _Capturing.attention

    def replay(self) -> None:
        """Run the forward pass of the capture, on its metadata and inputs."""
        from vllm.config import CUDAGraphMode

        # The first group of each stage has metadata of the running step.
        now = {metadata.seq_lens.data_ptr(): metadata for metadata in Graph.of_this_step.values()}
        for captured in self.attention.attn_metadata.values():
            built = now[captured.seq_lens.data_ptr()]
            assert built.query_start_loc.data_ptr() == captured.query_start_loc.data_ptr()
            # The CPU kernel's work list, which FlashAttention keeps in a tensor of its builder.
            captured.scheduler_metadata = built.scheduler_metadata
        self.forward(CUDAGraphMode.NONE)


class _Capturing:
    """The forward pass that vLLM is about to capture."""

    forward: Any
    attention: Any


def _nothing(*_: Any, **__: Any) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _like_a_gpu() -> Iterator[None]:
    """Let vLLM's CPU platform take the path of its CUDA platform."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    check = current_platform.check_and_update_config

    def checked(config: Any) -> None:
        compilation = config.compilation_config
        names = ("mode", "cudagraph_mode", "cudagraph_capture_sizes")
        before = {name: getattr(compilation, name) for name in names}
        check(config)
        for name, value in before.items():
            setattr(compilation, name, value)
        # Inductor does not work beside Triton's interpreter; all before it does.
        compilation.backend = "eager"

    capture = cudagraph_utils.CudaGraphManager.capture
    prepare = cudagraph_utils.prepare_inputs_to_capture

    def capturing(manager: Any, create: Any, *args: Any) -> None:
        def created(graph: Any, warmup: bool) -> Any:
            _Capturing.forward = create(graph, warmup=warmup)
            return _Capturing.forward

        capture(manager, created, *args)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        _Capturing.attention = prepare(*args, **kwargs)
        return _Capturing.attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(current_platform, "check_and_update_config", checked)
        patch.setattr(current_platform, "support_static_graph_mode", lambda: True)
        wrapper = f"{__name__}.{GraphPiece.__name__}"
        patch.setattr(current_platform, "get_static_graph_wrapper_cls", lambda: wrapper)
        patch.setattr(current_platform, "get_global_graph_pool", lambda: None)
        support = AttentionCGSupport.ALWAYS  # as FlashAttention 3
        patch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", support)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", _nothing)
        patch.setattr(cudagraph_utils, "graph_capture", _nothing)
        patch.setattr(cudagraph_utils, "capture_pool", _nothing)
        patch.setattr(cudagraph_utils.CudaGraphManager, "capture", capturing)
        patch.setattr(cudagraph_utils, "prepare_inputs_to_capture", prepared)
        patch.setattr(model_runner, "lock_workspace", lambda: None)  # CPUs have none
        yield


def runner_of(engine: Engine) -> Any:
    """The model runner of an engine in this process."""
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def engine_with_graphs(
    build: Callable[[dict[str, Any]], Engine], options: dict[str, Any]
) -> Engine:
    """An engine that plays CUDA graphs; `build` makes it from options."""
    with _like_a_gpu():
        engine = build(
            {
                **options,
                "compilation_config": {"cudagraph_capture_sizes": CAPTURE_SIZES},
                # From 0.33 on, CPU workers warm up kernels, and the interpreter does not take one.
                "kernel_config": {"enable_jit_warmup": False},
            }
        )
        runner = runner_of(engine)
        runner.capture_model()
    prepare = runner.model_state.prepare_attn

    def preparing(batch: Any, *args: Any, **kwargs: Any) -> Any:
        Graph.of_this_step = metadata = prepare(batch, *args, **kwargs)
        for of_layer in metadata.values():
            # A graph's attention runs for requests that only pad it, too: over nothing.
            assert not of_layer.seq_lens[batch.num_reqs :].any()
        return metadata

    runner.model_state.prepare_attn = preparing
    return engine


class Played:
    """Watches what such an engine's steps do.

    Attributes:
        chosen: mode and size of each step's graph.
        steps: steps by graph mode.
        padded: of these, steps with padding.
        replayed: full graphs, in order.
        pruning: steps that pruned, by graph mode.
        stages: stages that replayed captured pieces.
        padded_stages: of these, later ones of steps that pruned, with padding.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.runner = runner_of(engine)
        self._himap = getattr(self.runner, "himap", None)  # not in a stock engine
        self.forget()
        self._watch_steps()
        if self._himap is not None:
            self._watch_cache_writes(self._himap.settings)

    def forget(self) -> None:
        """Begin to count anew, with an empty prefix cache."""
        unfinished = self.engine.llm.llm_engine.has_unfinished_requests()
        assert not unfinished, "a step failed before; the engine would not come to an end"
        self.chosen: list[tuple[Any, int]] = []
        self.steps: Counter[str] = Counter()
        self.padded: Counter[str] = Counter()
        self.replayed: list[Any] = []
        self.pruning: Counter[str] = Counter()
        self.stages: Counter[int] = Counter()
        self.padded_stages = 0
        self.engine.llm.reset_prefix_cache()

    @property
    def full_graphs(self) -> dict[Any, Graph]:
        """All that were captured."""
        graphs: dict[Any, Graph] = self.runner.cudagraph_manager.graphs
        return graphs

    @property
    def step(self) -> Any:
        """The running step, if it prunes."""
        return None if self._himap is None else self._himap.step

    def _watch_steps(self) -> None:
        manager, state = self.runner.cudagraph_manager, self.runner.model_state
        run, prepare = manager.run_fullgraph, state.prepare_attn

        def running(graph: Any) -> Any:
            self.replayed.append(graph)
            return run(graph)

        def preparing(batch: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = prepare(batch, mode, *args, **kwargs)
            padded = batch.num_tokens_after_padding
            self.chosen.append((mode, padded))
            self.steps[mode.name] += 1
            self.padded[mode.name] += padded > batch.num_tokens
            if mode.name == "PIECEWISE":
                self.stages.update([0] if self.step is not None else [0, 1, 2])
            if self.step is not None:
                self.pruning[mode.name] += 1
                for stage, size in enumerate(self.step.graph_sizes):
                    if size is not None:
                        self.stages[stage] += 1
                        self.padded_stages += size > self.step.plan.stages[stage].num_tokens
            return metadata

        manager.run_fullgraph, state.prepare_attn = running, preparing

    def _watch_cache_writes(self, settings: Any) -> None:
        """In steps that prune, graphs and slots of each layer are those of its stage."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context
        from vllm.model_executor.models.utils import extract_layer_index

        attention_layers = self.runner.compilation_config.static_forward_context
        for name, attention in attention_layers.items():
            write = attention.impl.do_kv_cache_update
            layer = extract_layer_index(name)
            stage = (layer >= settings.shallow_layer) + (layer >= settings.deep_layer)

            def watched(
                module: Any,
                key: Any,
                value: Any,
                kv_cache: Any,
                slots: Any,
                _write: Any = write,
                _stage: int = stage,
            ) -> None:
                if self.step is not None:
                    num_tokens = self.step.plan.stages[_stage].num_tokens
                    size, mode = self.step.graph_sizes[_stage], CUDAGraphMode.PIECEWISE
                    if _stage == 0:
                        mode, size = self.chosen[-1]
                    elif size is None:
                        mode, size = CUDAGraphMode.NONE, num_tokens
                    assert get_forward_context().cudagraph_runtime_mode == mode
                    assert len(slots) == len(key) == size
                    assert (slots[:num_tokens] >= 0).all()
                    assert (slots[num_tokens:] == -1).all()
                _write(module, key, value, kv_cache, slots)

            attention.impl.do_kv_cache_update = watched
