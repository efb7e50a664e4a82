# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V2 (`vllm.v1.worker.gpu`, vLLM's default on CUDA).

vLLM seams (0.32):

* a model may bring its own `ModelState` (`get_model_state_cls`); ours lays out each step in
  `prepare_attn`, where vLLM's has all that it needs, and sees the KV cache groups in
  `initialize_kv_cache` and a step's end in `postprocess_state`;
* `GPUModelRunner.load_model(model=...)` takes a model that was loaded elsewhere: the model must be
  changed after it is loaded and before its state is built, and nothing else lies between the two.
  The one method of the runner that is overridden. Can go when vLLM calls plugins after loading;
* `BlockTables`: `input_block_table_ptrs`, `block_table_strides`, `block_sizes_tensor` (the batch's
  block tables, as vLLM's own kernels take them), `num_blocks` (what the scheduler allocated).
  Goes with slot mappings per group in `ModelState`;
* `CudaGraphManager.dispatch`: the graphs for what is left of a step behind a cut, as vLLM's own
  `FastPrefillHelper` asks for them. The state reaches the manager, and the block tables, through
  the runner. Goes when `ModelState` is shown them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from himap_vllm.kernels.stage_slots import write_stage_slots
from himap_vllm.model.install import install
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step import StepPlan
from himap_vllm.pruning.stage_metadata import QueryRows, StageView
from himap_vllm.pruning.step import PruningContext, PruningStep
from himap_vllm.runner.adapters import AdapterMixin
from himap_vllm.runner.warmup import NUM_TOKENS, warm_up

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:  # the class of the adopted runner is next in the method resolution order
    _Base = object


class PruningRunnerMixin(AdapterMixin, _Base):
    """Put in front of the runner's own class by `adopt`."""

    himap: PruningContext

    def load_model(self, load_dummy_weights: bool = False, *args: Any, **kwargs: Any) -> None:
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        with DeviceMemoryProfiler() as memory, self.jit_warmup_registry.activate():
            model = get_model_loader(self.load_config).load_model(
                vllm_config=self.vllm_config, model_config=self.model_config
            )
        self.himap = install(model, self.vllm_config)
        model.himap_state = self.himap
        model.get_model_state_cls = lambda: PruningModelState
        super().load_model(load_dummy_weights, *args, model=model, **kwargs)
        self.model_state.himap_runner = weakref.ref(self)
        self.model_memory_usage += memory.consumed_memory


class _LaterStages:
    """Geometry of the later stages in tensors that stay where they are.

    A captured CUDA graph reads the lengths of the sequences where they were when it was captured.
    Lengths and first rows lie side by side, so that one copy fills them, each stage's aligned as a
    tensor of its own would be.
    """

    _ALIGNMENT = 64  # elements

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._half = -(-(max_num_reqs + 1) // self._ALIGNMENT) * self._ALIGNMENT
        shape = (NUM_STAGES - 1, 2 * self._half)
        self._tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        self.seq_lens = self._tensor[:, :max_num_reqs]
        self.query_start_loc = self._tensor[:, self._half :]

    def copy(self, plan: StepPlan) -> None:
        """From the host, without waiting; requests that only pad the batch get length 0."""
        packed = np.zeros(self._tensor.shape, dtype=np.int32)
        for row, stage in zip(packed, plan.stages[1:], strict=True):
            num_reqs = len(stage.seq_lens)
            row[:num_reqs] = stage.seq_lens
            row[self._half :][: num_reqs + 1] = stage.query_start_loc
        async_tensor_h2d(packed, out=self._tensor)

    def copy_first_stage(self, seq_lens: torch.Tensor) -> None:
        """From the first stage's lengths, where the stages don't differ."""
        self.seq_lens[:, : len(seq_lens)] = seq_lens


class PruningModelState(DefaultModelState):
    """vLLM's state of a decoder-only model, with stages."""

    himap_runner: weakref.ref[_Base]  # whose state this is; set behind `load_model`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.himap: PruningContext = self.model.himap_state
        self._later = _LaterStages(self.max_num_reqs, self.device)
        self._request_ids: list[str] = []

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # A step that prunes has fewer tokens behind each cut, in no full graph.
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            raise ValueError(
                f"himap can't be combined with cudagraph_mode {mode.name}: steps that prune can't "
                "replay a full graph; use FULL_AND_PIECEWISE or FULL_DECODE_ONLY"
            )
        recorder = self.himap.recorder
        recorder.see_groups(kv_cache_config, self.model_config)
        stages = recorder.group_stages
        # The first group of each stage; its metadata serves the others.
        self._leaders = [stages.index(stage) for stage in range(NUM_STAGES)]
        later = [(group, stage - 1) for group, stage in enumerate(stages) if stage]
        self._later_groups = torch.tensor(later, device=self.device)

    @property
    def _runner(self) -> Any:
        runner = self.himap_runner()
        assert runner is not None
        return runner

    @property
    def _block_tables(self) -> Any:
        # Not kept: vLLM makes new ones after its trial run, whose must be gone by then.
        return self._runner.block_tables

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        full_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        self._see_step(input_batch, slot_mappings, full_graph)
        stages = self.himap.recorder.group_stages
        if self.himap.views is None:  # every stage sees the step as the first one does
            stages = [0] * len(stages)
        leaders = [self._leaders[stage] for stage in stages]
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            [groups if index in leaders else [] for index, groups in enumerate(attn_groups)],
            kv_cache_config,
            for_capture,
            ubatch_idx,
            **kwargs,
        )
        # A replay reads what its capture did. Only the tensors that builders keep matter then (a
        # FlashAttention schedule, say), and those of a stage's first group serve the others.
        replays = full_graph and not for_capture
        for index, leader in enumerate(leaders):
            if index == leader:
                continue
            (of_leader,) = attn_groups[leader]
            built = metadata[of_leader.layer_names[0]]
            for group in attn_groups[index]:
                # Where the kernel's blocks are smaller than the manager's, a tensor of the group's.
                table = group.map_to_kernel_block_table(block_tables[index], ubatch_idx)
                if not replays:
                    builder = group.get_metadata_builder(ubatch_idx)
                    own = builder.update_block_table(built, table, slot_mappings[index])
                    metadata.update(dict.fromkeys(group.layer_names, own))
        return metadata

    def _see_step(self, input_batch: Any, slot_mappings: torch.Tensor, full_graph: bool) -> None:
        """Lay out a step; dummy batches have no plans."""
        state = self.himap
        state.step = state.views = None
        plan = state.recorder.plans.plan_step(
            input_batch.req_ids,
            input_batch.num_computed_tokens_np,
            input_batch.num_scheduled_tokens,
        )
        later = self._later
        if plan is None:
            if full_graph:
                later.copy_first_stage(input_batch.seq_lens)
                state.views = [None, *map(StageView, later.seq_lens)]
            return
        later.copy(plan)
        write_stage_slots(
            self._later_groups,
            later.query_start_loc,
            later.seq_lens,
            input_batch.num_reqs,
            self._block_tables.input_block_table_ptrs,
            self._block_tables.block_table_strides,
            self._block_tables.block_sizes_tensor,
            slot_mappings,
        )
        prunes = plan.cuts is not None
        assert not (prunes and full_graph), "a step that prunes can't replay a full graph"
        state.views = [None, *(self._view(plan, stage) for stage in range(1, NUM_STAGES))]
        if prunes:
            captured = self._captured(plan, input_batch.num_reqs)
            state.step = PruningStep(plan, self.device, state.criterion, captured)
            self._request_ids = input_batch.req_ids
            self._count(plan, input_batch)

    def _captured(self, plan: StepPlan, num_reqs: int) -> list[int | None]:
        """Sizes of the piecewise graphs that vLLM would choose for steps as large as the stages."""
        if self.himap.enter_stage is not None:  # LoRA's kernels read another mapping per stage
            return [None] * NUM_STAGES
        dispatch = self._runner.cudagraph_manager.dispatch
        captured: list[int | None] = [None]  # the first stage's is chosen by vLLM itself
        for stage in plan.stages[1:]:
            graph = dispatch(
                num_reqs, stage.num_tokens, uniform_token_count=None, num_active_loras=0
            )
            piecewise = graph.cg_mode == CUDAGraphMode.PIECEWISE
            captured.append(graph.num_tokens if piecewise else None)
        return captured

    def _view(self, plan: StepPlan, stage: int) -> StageView:
        batch = plan.stages[stage]
        queries = None
        if plan.cuts is not None:
            num_reqs = len(batch.seq_lens)
            queries = QueryRows(
                query_start_loc=self._later.query_start_loc[stage - 1, : num_reqs + 1],
                query_start_loc_cpu=torch.from_numpy(batch.query_start_loc),
                num_tokens=batch.num_tokens,
                max_query_len=batch.max_query_len,
            )
        return StageView(
            seq_lens=self._later.seq_lens[stage - 1],
            max_seq_len=batch.max_seq_len,
            queries=queries,
        )

    def _count(self, plan: StepPlan, input_batch: Any) -> None:
        recorder = self.himap.recorder
        assert plan.cuts is not None
        for pruned in plan.cuts[0].requests:
            request_id = input_batch.req_ids[pruned.request]
            index = input_batch.idx_mapping_np[pruned.request]
            recorder.see_pruned(
                request_id,
                recorder.plans[request_id],
                self._block_tables.num_blocks.np[:, index].tolist(),
            )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile our kernels, which the first pruned prompt would wait for otherwise."""
        rope = self.rope_state  # only with M-RoPE
        positions = (
            torch.arange(NUM_TOKENS, device=self.device)
            if rope is None
            else rope.get_positions(NUM_TOKENS)
        )
        warm_up(self.himap, self.dtype, self.model_config.get_hidden_size(), positions)
        write_stage_slots(
            self._later_groups,
            self._later.query_start_loc,
            self._later.seq_lens,
            0,  # pads only
            self._block_tables.input_block_table_ptrs,
            self._block_tables.block_table_strides,
            self._block_tables.block_sizes_tensor,
            self._block_tables.slot_mappings,
        )

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        super().postprocess_state(*args, **kwargs)
        state = self.himap
        if state.step is not None:
            state.recorder.see_step_end(state.step, self._request_ids)
            state.step = None


def adopt(runner: Any) -> None:
    """Make a runner that vLLM has built a pruning one, before it loads its model."""
    base = type(runner)
    runner.__class__ = type(f"Pruning{base.__name__}", (PruningRunnerMixin, base), {})
