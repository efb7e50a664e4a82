# SPDX-License-Identifier: Apache-2.0
"""Inputs of a segment at persistent addresses, which its captured graphs read.

* `vllm.compilation.cuda_graph.CUDAGraphWrapper` (read): it leaves that to whoever calls a compiled
  module, and captures up to `max_cudagraph_capture_size` tokens. Remove when: vLLM keeps the inputs
  of captured pieces itself.
"""

from __future__ import annotations

import torch
from vllm.config import CUDAGraphMode, VllmConfig

from himap_vllm.kernels.gather import empty_positions

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""positions [num_tokens] or [3, num_tokens], hidden states and residual [num_tokens, hidden_size].
"""


class GraphInputs:
    """Buffers for as many tokens as the largest graph has."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        model_config = vllm_config.model_config
        self._num_tokens = 0
        # vLLM may still settle for piecewise graphs where others are configured.
        if vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            self._num_tokens = vllm_config.compilation_config.max_cudagraph_capture_size
        shape = (self._num_tokens, model_config.get_hidden_size())
        # Two tensors: in views of one tensor, torch.compile might treat the offset as constant.
        self._hidden_states = torch.zeros(shape, dtype=model_config.dtype, device=device)
        self._residual = torch.zeros_like(self._hidden_states)
        self._positions: torch.Tensor | None = None

    def rows(self, num_tokens: int, positions: torch.Tensor) -> Rows:
        """The first `num_tokens`; `positions` shows how positions are laid out."""
        if self._positions is None:  # with the first graph that is captured
            self._positions = empty_positions(positions, self._num_tokens).zero_()
        return (
            self._positions[..., :num_tokens],
            self._hidden_states[:num_tokens],
            self._residual[:num_tokens],
        )
