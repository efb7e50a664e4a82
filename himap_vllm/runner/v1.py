# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V1 (`GPUModelRunner` and its CPU subclass).

vLLM seams (0.32), each a method overridden on the one runner instance of the worker; all go with
Model Runner V1 itself:

* `load_model`: the model is changed right after loading, before KV cache specs are collected;
* `initialize_kv_cache`: the groups are checked against the plan, block tables are adopted;
* `_prepare_inputs`: the batch order is fixed; the step is laid out before it;
* `_get_slot_mappings`: the later stages have fewer tokens;
* `_build_attention_metadata`: sees one group of each stage;
* `execute_model`: whatever happens, no step outlives its forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID

from himap_vllm.model.install import install
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.table import ActivePlans
from himap_vllm.pruning.stage_metadata import StageView
from himap_vllm.pruning.step import PruningContext, PruningStep
from himap_vllm.runner import block_tables
from himap_vllm.runner.adapters import AdapterMixin
from himap_vllm.runner.block_tables import StageBlockTables

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:  # the class of the adopted runner is next in the method resolution order
    _Base = object


class PruningRunnerMixin(AdapterMixin, _Base):
    """Put in front of the runner's own class by `adopt`."""

    kv_cache_config: Any
    attn_groups: Any
    himap: PruningContext
    himap_leaders: list[int]
    himap_leading: tuple[Any, list[Any]]  # their KV cache configuration and attention groups

    @property
    def himap_plans(self) -> ActivePlans:
        """The plans of live requests."""
        return self.himap.recorder.plans

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.himap = install(self.get_model(), self.vllm_config)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        self.himap.recorder.see_groups(kv_cache_config, self.model_config)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        stages = self.himap.recorder.group_stages
        block_tables.adopt(self.input_batch.block_table, stages)
        # The first group of each stage; its metadata serves the others.
        leaders = self.himap_leaders = [stages.index(stage) for stage in range(NUM_STAGES)]
        groups = self.kv_cache_config.kv_cache_groups
        self.himap_leading = (
            replace(self.kv_cache_config, kv_cache_groups=[groups[i] for i in leaders]),
            [self.attn_groups[i] for i in leaders],
        )

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        batch = self.input_batch
        plan = self.himap_plans.plan_step(
            batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], num_scheduled_tokens
        )
        batch.block_table.himap_step_plan = plan
        if plan is not None:
            prunes = plan.cuts is not None
            later = (StageView.of(stage, self.device, prunes) for stage in plan.stages[1:])
            self.himap.views = [None, *later]
            if prunes:
                self.himap.step = PruningStep(plan, self.device, self.himap.criterion)
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)

    def _get_slot_mappings(
        self, num_tokens_padded: int, num_reqs_padded: int, num_tokens_unpadded: int, **kwargs: Any
    ) -> tuple[Any, Any]:
        tables = self.input_batch.block_table
        if not isinstance(tables, StageBlockTables):  # a trial run, before there is a KV cache
            return super()._get_slot_mappings(
                num_tokens_padded, num_reqs_padded, num_tokens_unpadded, **kwargs
            )
        slots = tables.himap_slots
        slots[:, num_tokens_unpadded:num_tokens_padded] = PAD_SLOT_ID
        by_group = list(slots[:, :num_tokens_padded].unbind())
        if self.himap.step is not None:
            stages = self.himap.step.plan.stages
            for index, stage in enumerate(self.himap.recorder.group_stages):
                if stage > 0:
                    by_group[index] = slots[index, : stages[stage].num_tokens]
        by_layer = {
            layer_name: of_group
            for group, of_group in zip(self.kv_cache_config.kv_cache_groups, by_group, strict=True)
            for layer_name in group.layer_names
        }
        return dict(enumerate(by_group)), by_layer

    def _build_attention_metadata(
        self, *, num_reqs: int, slot_mappings: dict[int, torch.Tensor], **kwargs: Any
    ) -> tuple[Any, Any]:
        """vLLM's, for a group of each stage; the others differ in blocks and slots only."""
        tables, leaders = self.input_batch.block_table, self.himap_leaders
        seen = self.kv_cache_config, self.attn_groups
        self.kv_cache_config, self.attn_groups = self.himap_leading
        self.input_batch.block_table = [tables[i] for i in leaders]
        try:
            metadata, common = super()._build_attention_metadata(
                num_reqs=num_reqs,
                slot_mappings={k: slot_mappings[i] for k, i in enumerate(leaders)},
                **kwargs,
            )
        finally:
            self.kv_cache_config, self.attn_groups = seen
            self.input_batch.block_table = tables
        stages = self.himap.recorder.group_stages
        groups = self.kv_cache_config.kv_cache_groups
        built = [metadata[groups[i].layer_names[0]] for i in leaders]
        num_rows = len(built[0].block_table)
        tables.himap_blocks[:, num_reqs:num_rows] = NULL_BLOCK_ID
        blocks = tables.himap_blocks[:, :num_rows].unbind()
        for index, (stage, group) in enumerate(zip(stages, groups, strict=True)):
            if index not in leaders:
                (of_group,) = self.attn_groups[index]
                table = of_group.map_to_kernel_block_table(blocks[index])
                builder = of_group.get_metadata_builder()
                own = builder.update_block_table(built[stage], table, slot_mappings[index])
                metadata.update(dict.fromkeys(group.layer_names, own))
        return metadata, common

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            if self.himap.step is not None:
                self._account(self.himap.step)
            return output
        finally:
            self.himap.step = self.himap.views = None

    def _account(self, step: PruningStep) -> None:
        recorder = self.himap.recorder
        request_ids = self.input_batch.req_ids
        assert step.plan.cuts is not None
        for pruned in step.plan.cuts[0].requests:
            request_id = request_ids[pruned.request]
            blocks = [len(blocks) for blocks in self.requests[request_id].block_ids]
            recorder.see_pruned(request_id, self.himap_plans[request_id], blocks)
        recorder.see_step_end(step, request_ids)


def adopt(runner: Any) -> None:
    """Make a runner that vLLM has built a pruning one, before it loads its model."""
    base = type(runner)
    runner.__class__ = type(f"Pruning{base.__name__}", (PruningRunnerMixin, base), {})
