# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V1 (`GPUModelRunner` and its CPU subclass).

vLLM seams (0.32), each a method overridden on the one runner instance of the worker; all go with
Model Runner V1 itself:

* `load_model`: the model is changed right after loading, before KV cache specs are collected;
* `initialize_kv_cache`: the groups are checked against the plan;
* `_update_states`: every request reaches the worker here, with its images and its ratios;
* `_prepare_inputs`: the batch order is fixed; the step is laid out behind it;
* `_get_slot_mappings`: slots of the later stages replace the ones computed for all tokens;
* `execute_model`: whatever happens, no step outlives its forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from himap_vllm.budget import PromptPlan
from himap_vllm.config import ADMISSION_ARG, engine_settings
from himap_vllm.install import install
from himap_vllm.kv_cache import bytes_per_block, group_stages
from himap_vllm.layout import step_layout
from himap_vllm.plans import image_tokens, plan_of, stage_layers
from himap_vllm.pruning import ActiveStep, PruningState

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:  # the class of the adopted runner is next in the method resolution order
    _Base = object

Trace = dict[str, list[list[int]]]


class PruningRunnerMixin(_Base):
    """Put in front of the runner's own class by `adopt`."""

    himap: PruningState
    himap_plans: dict[str, PromptPlan]
    himap_counted: set[str]
    himap_traces: OrderedDict[str, Trace]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        vllm_config = self.vllm_config
        settings = engine_settings(vllm_config.additional_config)
        assert settings is not None
        self.himap = install(self.get_model(), settings, vllm_config)
        self.himap_plans = {}
        self.himap_counted = set()
        self.himap_traces = OrderedDict()

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        layers = stage_layers(self.himap.settings, self.model_config)
        self.himap_group_stages = group_stages(kv_cache_config, layers)
        self.himap_bytes_per_block = bytes_per_block(kv_cache_config)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.himap_plans.pop(request_id, None)
            self.himap_counted.discard(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            # A known id is the next chunk of a streaming-input session: counted already.
            if request.req_id in self.requests or not image_tokens(request.mm_features):
                continue
            plan = plan_of(
                len(request.prompt_token_ids), request.mm_features, request.sampling_params
            )
            if plan is not None:
                self.himap_plans[request.req_id] = plan
            else:
                args = request.sampling_params.extra_args or {}
                self.himap.stats.requests[args.get(ADMISSION_ARG, "unpruned")] += 1
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        plans = [self.himap_plans.get(request_id) for request_id in batch.req_ids]
        if any(plan is not None for plan in plans):
            layout = step_layout(
                batch.num_computed_tokens_cpu[: batch.num_reqs], num_scheduled_tokens, plans
            )
            self.himap.step = ActiveStep(layout, self.device)
        return prepared

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
        step = self.himap.step
        if step is None:
            return by_group, by_layer
        num_reqs = self.input_batch.num_reqs
        tensors = [
            (torch.from_numpy(stage.query_start_loc), torch.from_numpy(stage.positions))
            for stage in step.layout.stages
        ]
        groups = self.kv_cache_config.kv_cache_groups
        for group_id, stage in enumerate(self.himap_group_stages):
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
            if self.himap.step is not None and self.himap.step.prunes:
                self._account(self.himap.step)
            return output
        finally:
            self.himap.step = None

    def _account(self, step: ActiveStep) -> None:
        stats = self.himap.stats
        stats.count_step(step.seconds)
        assert step.layout.cuts is not None
        for pruned in step.layout.cuts[0].requests:
            request_id = self.input_batch.req_ids[pruned.request]
            if self.himap.settings.trace_requests:
                self._trace(request_id, step, pruned.request)
            if request_id in self.himap_counted:
                stats.recomputed += 1
                continue
            self.himap_counted.add(request_id)
            seen, shallow, deep = (
                sum(column) for column in zip(*self.himap_plans[request_id].counts, strict=True)
            )
            stats.requests["pruned"] += 1
            stats.image_tokens += seen
            stats.image_tokens_kept_shallow += shallow
            stats.image_tokens_kept_deep += deep
            stats.count_blocks(
                [len(blocks) for blocks in self.requests[request_id].block_ids],
                self.himap_group_stages,
                self.himap_bytes_per_block,
            )

    def _trace(self, request_id: str, step: ActiveStep, row: int) -> None:
        """Remember where the surviving image tokens of one prompt stood in it."""
        plan = self.himap_plans[request_id]
        first, second = step.rows
        begin = step.layout.stages[0].query_start_loc[row]
        offset = int(
            step.layout.stages[0].seq_lens[row] - step.layout.stages[0].query_start_loc[row + 1]
        )
        trace: Trace = {}
        for name, rows in (("shallow", first), ("deep", first[second])):
            alive = {int(r) + offset for r in rows.tolist() if r >= begin}
            trace[name] = [
                [p for run in image.runs for p in range(*run) if p in alive]
                for image in plan.images
            ]
        self.himap_traces[request_id] = trace
        while len(self.himap_traces) > self.himap.settings.trace_requests:
            self.himap_traces.popitem(last=False)


def adopt(runner: Any) -> None:
    """Make a runner that vLLM has built a pruning one, before it loads its model."""
    base = type(runner)
    runner.__class__ = type(f"Pruning{base.__name__}", (PruningRunnerMixin, base), {})
