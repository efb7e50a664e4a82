# SPDX-License-Identifier: Apache-2.0
"""Code that the adapters to both model runners share.

* `vllm.v1.worker.utils.AttentionGroup` (called): its builders make the metadata of a group from
  that of another of its stage. Remove when: vLLM shares metadata among KV cache groups that are
  alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from himap_vllm.plan.step_layout import StepPlan
from himap_vllm.pruning.context import PruningContext
from himap_vllm.pruning.kv_groups import StageGroups
from himap_vllm.pruning.pruning_step import PruningStep


def make_pruning_runner(runner: Any, mixin: type) -> None:
    """Put `mixin` in front of the class of a runner that vLLM has built but not loaded yet."""
    base = type(runner)
    runner.__class__ = type(f"Pruning{base.__name__}", (mixin, base), {})


def share_metadata(
    metadata: dict[str, Any],
    leaders: Sequence[int],
    attn_groups: Sequence[Sequence[Any]],
    block_tables: Sequence[torch.Tensor],
    slot_mappings: Sequence[torch.Tensor] | torch.Tensor,
    ubatch_idx: int = 0,
    replays: bool = False,
) -> None:
    """Give the layers of each KV cache group metadata made from that of another group.

    Args:
        metadata: by layer; has that of the leaders, and gets that of the others.
        leaders: [num_groups] the group whose metadata serves it; a leader serves itself.
        attn_groups: [num_groups] vLLM's.
        block_tables: [num_groups] the batch's.
        slot_mappings: [num_groups] the step's.
        ubatch_idx: vLLM's.
        replays: the step replays a full CUDA graph, which reads the tensors of its capture. Only
            tensors that builders keep matter then (a FlashAttention schedule, for example), and a
            leader's tensors serve the other groups.
    """
    for index, leader in enumerate(leaders):
        if index == leader:
            continue
        (of_leader,) = attn_groups[leader]
        built = metadata[of_leader.layer_names[0]]
        for group in attn_groups[index]:
            # The group has its own tensor if the kernel's blocks are smaller than the manager's.
            table = group.map_to_kernel_block_table(block_tables[index], ubatch_idx)
            if not replays:
                builder = group.get_metadata_builder(ubatch_idx)
                own = builder.update_block_table(built, table, slot_mappings[index])
                metadata.update(dict.fromkeys(group.layer_names, own))


def count_pruned(
    context: PruningContext,
    groups: StageGroups,
    plan: StepPlan,
    request_ids: Sequence[str],
    blocks_of: Callable[[int], Sequence[int]],
) -> None:
    """Count the prompts of which a step prunes the last unit.

    Args:
        context: of the model.
        groups: the KV cache groups.
        plan: of the step.
        request_ids: [num_reqs] in batch order.
        blocks_of: row in the batch -> [num_groups] blocks that the request holds.
    """
    plans = context.requests.plans
    for unit in plan.pruned_units:
        row = unit.request
        if unit.index == len(plans[request_ids[row]].units) - 1:
            num_tokens = int(plan.stages[0].seq_lens[row])
            context.requests.on_pruned(request_ids[row], num_tokens, blocks_of(row), groups)


def count_step(context: PruningContext, step: PruningStep, request_ids: Sequence[str]) -> None:
    """Count a step that pruned, and trace its units, once its forward pass is launched."""
    context.stats.count_step(step.seconds)
    for index, unit in enumerate(step.plan.pruned_units):
        request_id = request_ids[unit.request]
        plan = context.requests.plans[request_id]
        context.traces.on_pruned(request_id, plan, step, index)
        context.request_traces.on_pruned(request_id, plan, step, index)
