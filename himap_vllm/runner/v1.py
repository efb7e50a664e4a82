# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V1 (`GPUModelRunner` and its CPU subclass).

vLLM seams (0.32), each a method overridden on the one runner instance of the worker; all go with
Model Runner V1 itself:

* `load_model`: the model is changed right after loading, before KV cache specs are collected;
* `initialize_kv_cache`: the groups are checked against the plan;
* `_prepare_inputs`: the batch order is fixed; the step is laid out behind it;
* `_get_slot_mappings`: slots of the later stages replace the ones computed for all tokens;
* `execute_model`: whatever happens, no step outlives its forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from himap_vllm.install import install
from himap_vllm.layout import PlanTable, StepLayout
from himap_vllm.pruning import ActiveStep, PruningState
from himap_vllm.runner.adapters import AdapterMixin
from himap_vllm.stage_view import StageView

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:  # the class of the adopted runner is next in the method resolution order
    _Base = object


class PruningRunnerMixin(AdapterMixin, _Base):
    """Put in front of the runner's own class by `adopt`."""

    himap: PruningState
    himap_layout: StepLayout | None

    @property
    def himap_plans(self) -> PlanTable:
        """The plans of live requests."""
        return self.himap.recorder.plans

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.himap = install(self.get_model(), self.vllm_config)
        self.himap_layout = None

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        self.himap.recorder.see_groups(kv_cache_config, self.model_config)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        layout = self.himap_plans.layout(
            batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], num_scheduled_tokens
        )
        if layout is not None:
            self.himap_layout = layout
            later = (StageView.of(stage, self.device) for stage in layout.stages[1:])
            self.himap.views = [None, *later]
            if layout.cuts is not None:
                self.himap.step = ActiveStep(layout, self.device, self.himap.criterion)
        return prepared

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
        layout = self.himap_layout
        if layout is None:
            return by_group, by_layer
        num_reqs = self.input_batch.num_reqs
        tensors = [
            (torch.from_numpy(stage.query_start_loc), torch.from_numpy(stage.positions))
            for stage in layout.stages
        ]
        groups = self.kv_cache_config.kv_cache_groups
        for group_id, stage in enumerate(self.himap.recorder.group_stages):
            if stage == 0:
                continue
            query_start_loc, positions = tensors[stage]
            table = self.input_batch.block_table[group_id]
            table.compute_slot_mapping(num_reqs, query_start_loc, positions)
            by_group[group_id] = table.slot_mapping.gpu[: len(positions)]
            for layer_name in groups[group_id].layer_names:
                by_layer[layer_name] = by_group[group_id]
        return by_group, by_layer

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            if self.himap.step is not None:
                self._account(self.himap.step)
            return output
        finally:
            self.himap.step = self.himap.views = self.himap_layout = None

    def _account(self, step: ActiveStep) -> None:
        recorder = self.himap.recorder
        request_ids = self.input_batch.req_ids
        assert step.layout.cuts is not None
        for pruned in step.layout.cuts[0].requests:
            request_id = request_ids[pruned.request]
            blocks = [len(blocks) for blocks in self.requests[request_id].block_ids]
            recorder.see_pruned(request_id, self.himap_plans[request_id], blocks)
        recorder.see_step_end(step, request_ids)


def adopt(runner: Any) -> None:
    """Make a runner that vLLM has built a pruning one, before it loads its model."""
    base = type(runner)
    runner.__class__ = type(f"Pruning{base.__name__}", (PruningRunnerMixin, base), {})
