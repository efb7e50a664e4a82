# SPDX-License-Identifier: Apache-2.0
"""The decoder in three segments with a gather between them.

vLLM compiles a decoder as one graph. The gathers change the number of tokens by an amount that
differs from step to step, so each segment is a graph of its own, with a dynamic token dimension
like vLLM's. A step that prunes nothing runs the three one after the other; vLLM captures them in
one full CUDA graph, as it does the decoder of another model.

With piecewise CUDA graphs (mixed steps, by default) there are two differences:

* vLLM reuses the memory of a compiled module's last output for the pieces captured next, because
  usually nothing but the model's output follows. Here another segment follows, so its inputs are
  copied to buffers of their own. (Gemma3n, whose decoder is two compiled modules in vLLM, does the
  same.)
* Behind a cut, a segment replays smaller graphs: those that vLLM would choose for a step with as
  many tokens as are left. The gather writes to the buffers that these graphs read. (vLLM's fast
  prefill with a shared KV cache does the same.)

Supported are vLLM decoders of the common form: `layers` called as `(positions, hidden_states,
residual) -> (hidden_states, residual)`, then `norm(hidden_states, residual)`. Positions are
[num_tokens], or [3, num_tokens] with M-RoPE. Deepstack (Qwen3-VL) adds visual features after the
first layers, so the first cut must lie behind them.

* `vllm.compilation.decorators.support_torch_compile`, `vllm.compilation.backends.set_model_tag`
  (called): each segment is compiled by itself, under a name of its own. Remove when: vLLM compiles
  a decoder that changes its number of tokens.
* `vllm.compilation.cuda_graph.CUDAGraphWrapper` (read): the above on the outputs and inputs of
  captured pieces is what it does. Remove when: vLLM keeps the inputs of captured pieces itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    override_forward_context,
)
from vllm.sequence import IntermediateTensors

from himap_vllm.kernels.gather import gather_rows
from himap_vllm.model.graph_inputs import GraphInputs, Rows

if TYPE_CHECKING:
    from himap_vllm.pruning.context import PruningContext
    from himap_vllm.pruning.pruning_step import PruningStep

_DYNAMIC = {"positions": -1, "hidden_states": 0}


# Three classes, not one: vLLM keys its cache of compiled functions by where `forward` is written.
@support_torch_compile(dynamic_arg_dims={**_DYNAMIC, "deepstack_input_embeds": 0})
class FirstSegment(nn.Module):
    """Layers before the first cut; there is no residual yet."""

    def __init__(self, *, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @override
    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = None
        for index, layer in enumerate(self.layers):
            hidden_states, residual = layer(positions, hidden_states, residual)
            # vLLM's name and order (Qwen3LLMModel): behind layer 0, 1, ...
            if deepstack_input_embeds is not None and index < len(deepstack_input_embeds):
                visual = deepstack_input_embeds[f"deepstack_input_embeds_{index}"]
                hidden_states = hidden_states + visual
        assert residual is not None
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={**_DYNAMIC, "residual": 0})
class MiddleSegment(nn.Module):
    """Layers between the cuts."""

    def __init__(self, *, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @override
    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={**_DYNAMIC, "residual": 0})
class LastSegment(nn.Module):
    """Layers after the second cut, and the final norm."""

    def __init__(self, *, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    @override
    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class _SegmentedDecoder(nn.Module):
    """Mixed into the class of a loaded decoder by `install_segments`."""

    # Plain tuples and objects, not registered: the layers stay where the checkpoint has them.
    himap_segments: tuple[FirstSegment, MiddleSegment, LastSegment]
    himap_context: PruningContext
    himap_later_layers: tuple[tuple[str, ...], tuple[str, ...]]
    # One per segment behind a cut. They must differ: a segment may return its own input.
    himap_inputs: tuple[GraphInputs, GraphInputs]

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # vLLM's `support_torch_compile` puts the compiled whole into `__call__`; not used here.
        return self.forward(*args, **kwargs)

    @override
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> torch.Tensor:
        assert intermediate_tensors is None, "pipeline parallelism is refused at start-up"
        if inputs_embeds is None:
            embed_input_ids: Any = self.embed_input_ids
            inputs_embeds = embed_input_ids(input_ids)
            assert inputs_embeds is not None
        step = self.himap_context.step
        if step is None:
            return self._forward_unpruned(positions, inputs_embeds, deepstack_input_embeds)
        return self._forward_pruning(step, positions, inputs_embeds, deepstack_input_embeds)

    def _forward_unpruned(
        self,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor,
        deepstack_input_embeds: IntermediateTensors | None,
    ) -> torch.Tensor:
        """A step that prunes nothing: the three segments, with every row."""
        first, middle, last = self.himap_segments
        hidden_states, residual = first(positions, inputs_embeds, deepstack_input_embeds)
        hidden_states, residual = middle(*self._hand_over(1, positions, hidden_states, residual))
        output: torch.Tensor = last(*self._hand_over(2, positions, hidden_states, residual))
        return output

    def _hand_over(self, stage: int, *stream: torch.Tensor) -> Rows:
        """Return the inputs of a later stage's segment, at the addresses that graphs read."""
        positions, hidden_states, residual = stream
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return positions, hidden_states, residual
        inputs = self.himap_inputs[stage - 1].rows(len(hidden_states), positions)
        for room, value in zip(inputs, stream, strict=True):
            room.copy_(value)
        return inputs

    def _forward_pruning(
        self,
        step: PruningStep,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor,
        deepstack_input_embeds: IntermediateTensors | None,
    ) -> torch.Tensor:
        first, middle, last = self.himap_segments
        # Each segment may be padded to a captured size, but no surviving row is padding.
        hidden_states, residual = first(positions, inputs_embeds, deepstack_input_embeds)
        rows = step.cut(0, hidden_states, residual)
        with self._stage(step, 1):
            inputs = self._gather(step, 1, rows, positions, hidden_states, residual)
            # What a cut has gathered from is let go before layers run, so that such a step takes no
            # more memory than one that prunes nothing, which is what vLLM measures.
            del hidden_states, residual
            hidden_states, residual = middle(*inputs)
            positions = inputs[0]
            del inputs
            again = step.cut(1, hidden_states, residual)
        with self._stage(step, 2):
            inputs = self._gather(step, 2, again, positions, hidden_states, residual)
            del hidden_states, residual
            hidden_states = last(*inputs)
            del inputs
        # The runner's sampling indices count every token of the step.
        full: torch.Tensor = hidden_states.new_zeros(len(inputs_embeds), hidden_states.shape[-1])
        full.index_copy_(0, rows.index_select(0, again), hidden_states[: len(again)])
        return full

    def _gather(
        self,
        step: PruningStep,
        stage: int,
        rows: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
    ) -> Rows:
        size = step.graph_sizes[stage]
        out = None
        if size is not None:
            out = self.himap_inputs[stage - 1].rows(size, positions)
        return gather_rows(rows, positions, hidden_states, residual, out)

    @contextmanager
    def _stage(self, step: PruningStep, stage: int) -> Iterator[None]:
        """Set vLLM's forward context for the tokens of a later stage.

        * `vllm.forward_context.ForwardContext.slot_mapping` (overridden): slot mappings of the
          stage's layers are cut to length, as the kernels that write the KV cache take one row per
          slot. Slots of padding are padding. Remove when: vLLM has slot mappings per group of
          layers that may differ in length.
        * `vllm.forward_context.override_forward_context`, `vllm.forward_context.BatchDescriptor`
          (called): captured pieces are found by graph mode and batch descriptor; this is the one
          under which vLLM captures without LoRA. Remove when: vLLM chooses graphs for a part of a
          model.
        """
        batch = step.plan.stages[stage]
        if self.himap_context.enter_stage is not None:
            self.himap_context.enter_stage(batch)
        context = get_forward_context()
        slots = context.slot_mapping
        assert isinstance(slots, dict), "dual batch overlap is refused at start-up"
        size = step.graph_sizes[stage]
        num_tokens = batch.num_tokens if size is None else size
        layers = self.himap_later_layers[stage - 1]
        later = replace(
            context,
            slot_mapping={**slots, **{name: slots[name][:num_tokens] for name in layers}},
            cudagraph_runtime_mode=(
                CUDAGraphMode.NONE if size is None else CUDAGraphMode.PIECEWISE
            ),
            batch_descriptor=None if size is None else BatchDescriptor(size),
        )
        with override_forward_context(later):
            yield


def install_segments(
    decoder: Any,
    attention_layers: Sequence[str],
    context: PruningContext,
    vllm_config: VllmConfig,
) -> None:
    """Make a loaded decoder run in three segments.

    Rebinds the class of this one instance, so that whatever calls the decoder gets the new
    behaviour; its parameters, their names and the model around it are untouched.

    Args:
        decoder: vLLM's.
        attention_layers: name of each layer's attention.
        context: shared with runner and attention.
        vllm_config: the engine's configuration.
    """
    settings = context.settings
    layers = list(decoder.layers)
    shallow, deep = settings.shallow_layer, settings.deep_layer
    with set_current_vllm_config(vllm_config):
        with set_model_tag("himap_first"):
            first = FirstSegment(layers=layers[:shallow])
        with set_model_tag("himap_middle"):
            middle = MiddleSegment(layers=layers[shallow:deep])
        with set_model_tag("himap_last"):
            last = LastSegment(layers=layers[deep:], norm=decoder.norm)
    base = type(decoder)
    decoder.__class__ = type(f"Segmented{base.__name__}", (_SegmentedDecoder, base), {})
    decoder.himap_segments = (first, middle, last)
    decoder.himap_context = context
    decoder.himap_later_layers = (
        tuple(attention_layers[shallow:deep]),
        tuple(attention_layers[deep:]),
    )
    device = next(decoder.parameters()).device
    decoder.himap_inputs = GraphInputs(vllm_config, device), GraphInputs(vllm_config, device)
