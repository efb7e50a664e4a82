# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V1 (`GPUModelRunner` and its CPU subclass).

* `vllm.v1.worker.gpu_model_runner.GPUModelRunner.load_model` (overridden): the
  model is changed right after loading, before KV cache specs are collected. Remove when: Model
  Runner V1 goes.
* `vllm.v1.worker.gpu_model_runner.GPUModelRunner.initialize_kv_cache` (overridden):
  the groups are checked against the plan, block tables become `StageBlockTables`. Remove when:
  Model Runner V1 goes.
* `vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs` (overridden): the
  batch order is fixed there; the step is planned before it. Remove when: Model Runner V1 goes.
* `vllm.v1.worker.gpu_model_runner.GPUModelRunner._get_slot_mappings` (overridden):
  the later stages have fewer tokens. Remove when: Model Runner V1 goes.
* `vllm.v1.worker.gpu_model_runner.GPUModelRunner._build_attention_metadata`
  (overridden): it sees one group of each stage, or building metadata for every group would cost
  more than pruning saves. Remove when: Model Runner V1 goes.
* `vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model` (overridden):
  whatever happens, no step outlives its forward pass. Remove when: Model Runner V1 goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from himap_vllm.model.install import install
from himap_vllm.pruning.context import PruningContext
from himap_vllm.pruning.kv_groups import StageGroups, made_groups
from himap_vllm.pruning.stage_metadata import StageAttentionMetadata
from himap_vllm.runner.adapters import AdapterMixin
from himap_vllm.runner.common import count_pruned, count_step, share_metadata
from himap_vllm.runner.v1_block_tables import StageBlockTables, make_stage_block_tables

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:  # the class of vLLM's runner is next in the method resolution order
    _Base = object


class PruningRunnerMixin(AdapterMixin, _Base):
    """Put in front of the runner's own class by `make_pruning_runner`."""

    kv_cache_config: Any
    attn_groups: Any
    himap: PruningContext
    himap_groups: StageGroups
    himap_leading: tuple[Any, list[Any]]  # leaders' KV cache configuration and attention groups

    @override
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.himap = install(self.get_model(), self.vllm_config)

    @override
    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        groups = made_groups(kv_cache_config, self.himap.settings, self.model_config)
        self.himap_groups = groups
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        make_stage_block_tables(self.input_batch.block_table, groups.stages)
        kv_cache_groups = self.kv_cache_config.kv_cache_groups
        self.himap_leading = (
            replace(
                self.kv_cache_config, kv_cache_groups=[kv_cache_groups[i] for i in groups.leaders]
            ),
            [self.attn_groups[i] for i in groups.leaders],
        )

    @override
    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        batch = self.input_batch
        plan = self.himap.requests.plans.plan_step(
            batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], num_scheduled_tokens
        )
        batch.block_table.himap_step_plan = plan
        if plan is not None:
            later = [
                StageAttentionMetadata.of(stage, self.device, plan.prunes)
                for stage in plan.stages[1:]
            ]
            self.himap.begin_step(plan, self.device, later)
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)

    @override
    def _get_slot_mappings(
        self,
        num_tokens_padded: int,
        num_reqs_padded: int,
        num_tokens_unpadded: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        tables = self.input_batch.block_table
        if not isinstance(tables, StageBlockTables):  # a trial run, before there is a KV cache
            trial: tuple[Any, Any] = super()._get_slot_mappings(
                num_tokens_padded, num_reqs_padded, num_tokens_unpadded, *args, **kwargs
            )
            return trial
        slots = tables.himap_slots
        slots[:, num_tokens_unpadded:num_tokens_padded] = PAD_SLOT_ID
        by_group = list(slots[:, :num_tokens_padded].unbind())
        if self.himap.step is not None:
            stages = self.himap.step.plan.stages
            for index, stage in enumerate(self.himap_groups.stages):
                if stage > 0:
                    by_group[index] = slots[index, : stages[stage].num_tokens]
        by_layer = {
            layer_name: of_group
            for group, of_group in zip(self.kv_cache_config.kv_cache_groups, by_group, strict=True)
            for layer_name in group.layer_names
        }
        return dict(enumerate(by_group)), by_layer

    @override
    def _build_attention_metadata(
        self, num_tokens: int, num_reqs: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Build one group's metadata per stage. Other groups differ only in blocks and slots."""
        slot_mappings = kwargs["slot_mappings"]
        kwargs["slot_mappings"] = {
            k: slot_mappings[i] for k, i in enumerate(self.himap_groups.leaders)
        }
        tables, leaders = self.input_batch.block_table, self.himap_groups.leaders
        seen = self.kv_cache_config, self.attn_groups
        self.kv_cache_config, self.attn_groups = self.himap_leading
        self.input_batch.block_table = [tables[i] for i in leaders]
        try:
            metadata, common = super()._build_attention_metadata(
                num_tokens, num_reqs, *args, **kwargs
            )
        finally:
            self.kv_cache_config, self.attn_groups = seen
            self.input_batch.block_table = tables
        first_layer = self.kv_cache_config.kv_cache_groups[leaders[0]].layer_names[0]
        num_rows = len(metadata[first_layer].block_table)
        share_metadata(
            metadata,
            [leaders[stage] for stage in self.himap_groups.stages],
            self.attn_groups,
            tables.himap_tables(num_reqs, num_rows),
            [slot_mappings[i] for i in range(len(self.attn_groups))],
        )
        return metadata, common

    @override
    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            step = self.himap.step
            if step is not None:
                request_ids = self.input_batch.req_ids

                def blocks_of(row: int) -> list[int]:
                    return [len(blocks) for blocks in self.requests[request_ids[row]].block_ids]

                count_pruned(self.himap, self.himap_groups, step.plan, request_ids, blocks_of)
                count_step(self.himap, step, request_ids)
            return output
        finally:
            self.himap.end_step()
