# SPDX-License-Identifier: Apache-2.0
"""The decoder in three segments with a gather between them.

vLLM compiles a decoder as one graph. The gathers change the number of tokens by an amount that
differs from step to step, so each segment is a graph of its own, with a dynamic token dimension
like vLLM's. A step that prunes nothing runs the three one after the other.

For vLLM decoders of the plain common form: `layers` called as `(positions, hidden_states,
residual) -> (hidden_states, residual)`, then `norm(hidden_states, residual)`; positions are
[num_tokens]. A family with another form (M-RoPE, deepstack) extends this when it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config

from himap_vllm.pruning import ActiveStep, PruningState

_DYNAMIC = {"positions": 0, "hidden_states": 0}


# Three classes, not one: vLLM keys its cache of compiled functions by where `forward` is written.
@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class FirstSegment(nn.Module):
    """Layers before the first cut; there is no residual yet."""

    def __init__(self, *, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        assert residual is not None
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={**_DYNAMIC, "residual": 0})
class MiddleSegment(nn.Module):
    """Layers between the cuts."""

    def __init__(self, *, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

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

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class _SegmentedDecoder(nn.Module):
    """Mixed into the class of a loaded decoder by `install_segments`."""

    # Plain tuple and object, not registered: the layers stay where the checkpoint has them.
    himap_segments: tuple[FirstSegment, MiddleSegment, LastSegment]
    himap_state: PruningState

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # vLLM's `support_torch_compile` puts the compiled whole into `__call__`; not used here.
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert intermediate_tensors is None, "pipeline parallelism is refused at start-up"
        assert positions.ndim == 1, "M-RoPE is not supported"
        if inputs_embeds is None:
            embed_input_ids: Any = self.embed_input_ids
            inputs_embeds = embed_input_ids(input_ids)
            assert inputs_embeds is not None
        step = self.himap_state.step
        if step is not None and step.prunes:
            return self._forward_pruning(step, positions, inputs_embeds)
        first, middle, last = self.himap_segments
        hidden_states, residual = first(positions, inputs_embeds)
        hidden_states, residual = middle(positions, hidden_states, residual)
        return last(positions, hidden_states, residual)

    def _forward_pruning(
        self, step: ActiveStep, positions: torch.Tensor, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        first, middle, last = self.himap_segments
        assert len(inputs_embeds) == step.layout.stages[0].num_tokens, "padded step"
        hidden_states, residual = first(positions, inputs_embeds)
        rows = step.cut(0, len(hidden_states))
        positions = positions.index_select(0, rows)
        hidden_states, residual = middle(
            positions, hidden_states.index_select(0, rows), residual.index_select(0, rows)
        )
        again = step.cut(1, len(hidden_states))
        hidden_states = last(
            positions.index_select(0, again),
            hidden_states.index_select(0, again),
            residual.index_select(0, again),
        )
        # The runner's indices of rows to sample from count every token of the step.
        full = hidden_states.new_zeros(len(inputs_embeds), hidden_states.shape[-1])
        return full.index_copy_(0, rows.index_select(0, again), hidden_states)


def install_segments(decoder: Any, state: PruningState, vllm_config: VllmConfig) -> None:
    """Make a loaded decoder run in three segments.

    Rebinds the class of this one instance, so that whatever calls the decoder gets the new
    behaviour; its parameters, their names and the model around it are untouched.
    """
    settings = state.settings
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
    decoder.himap_state = state
