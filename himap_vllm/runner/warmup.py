# SPDX-License-Identifier: Apache-2.0
"""Run the kernels of a pruning step once, on a made-up prompt."""

from __future__ import annotations

import torch

from himap_vllm.kernels.gather import gather_rows
from himap_vllm.kernels.importance import KeyPages
from himap_vllm.plan.prompt import ImageTokens, Ratios, make_plan
from himap_vllm.plan.step_layout import plan_step
from himap_vllm.pruning.context import PruningContext
from himap_vllm.pruning.pruning_step import PruningStep

NUM_TOKENS = 64  # of the made-up prompt


def warm_up(
    context: PruningContext, dtype: torch.dtype, hidden_size: int, prompt_positions: torch.Tensor
) -> None:
    """Score and gather at both cuts of a made-up prompt, with and without cached keys.

    The shapes that Triton compiles for are the model's: heads, strides of a fused projection.

    Args:
        context: of the model.
        dtype: of its activations.
        hidden_size: of its decoder.
        prompt_positions: [NUM_TOKENS] or, with M-RoPE, [3, NUM_TOKENS] any positions, laid out
            like the runner's, and on its device.
    """
    heads = context.heads
    device = prompt_positions.device
    plan = make_plan(NUM_TOKENS, [ImageTokens(((16, 48),))], Ratios(0.5, 0.5))
    # One page with keys and values side by side, as FlashAttention has them.
    page = torch.zeros(1, heads.num_kv_heads, 16, 2 * heads.head_size, dtype=dtype, device=device)
    block_table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    cached = KeyPages(page[..., : heads.head_size], block_table)
    for num_computed in (0, 16):
        step_plan = plan_step([num_computed], [NUM_TOKENS - num_computed], [plan])
        step = PruningStep(step_plan, device, context.criteria, prior=context.prior)
        positions = prompt_positions
        for cut in range(2):
            num_tokens = step.plan.stages[cut].num_tokens
            widths = [
                count * heads.head_size
                for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
            ]
            fused = torch.zeros(num_tokens, sum(widths), dtype=dtype, device=device)
            query, key, _ = fused.split(widths, dim=1)
            query = query.view(num_tokens, heads.num_heads, heads.head_size)
            key = key.view(num_tokens, heads.num_kv_heads, heads.head_size)
            step.cuts[cut].score(query, key, 1.0, lambda *_, cached=cached: cached)
            hidden_states = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device)
            rows = step.cut(cut, hidden_states, hidden_states)
            positions, _, _ = gather_rows(rows, positions, hidden_states, hidden_states)
