# SPDX-License-Identifier: Apache-2.0
"""Adapter to Model Runner V2 (`vllm.v1.worker.gpu`, vLLM's default on CUDA).

* `vllm.v1.worker.gpu.model_states.default.DefaultModelState.prepare_attn` (overridden): it has all
  that planning a step needs. The model brings our state through `get_model_state_cls`. Remove when:
  vLLM plans the batches of layers that see fewer tokens.
* `vllm.v1.worker.gpu.model_states.default.DefaultModelState.initialize_kv_cache` (overridden): it
  is shown the KV cache groups. Remove when: vLLM plans the batches of layers that see fewer tokens.
* `vllm.v1.worker.gpu.model_states.default.DefaultModelState.postprocess_state` (overridden): the
  end of a step. Remove when: vLLM plans the batches of layers that see fewer tokens.
* `vllm.v1.worker.gpu.model_runner.GPUModelRunner.load_model` (overridden): it takes a model that
  was loaded elsewhere. The model must be changed after it is loaded and before its state is built,
  and nothing else lies between the two. Remove when: vLLM calls plugins after loading.
* `vllm.model_executor.model_loader.get_model_loader`, `vllm.utils.mem_utils.DeviceMemoryProfiler`,
  `vllm.v1.worker.gpu.model_runner.GPUModelRunner.jit_warmup_registry` (called): load that model as
  the runner would. Remove when: vLLM calls plugins after loading.
* `vllm.v1.worker.gpu.block_table.BlockTables.input_block_table_ptrs`,
  `vllm.v1.worker.gpu.block_table.BlockTables.block_table_strides`,
  `vllm.v1.worker.gpu.block_table.BlockTables.block_sizes_tensor` (read): the batch's block
  tables, as vLLM's own kernels take them. Remove when: `ModelState` has slot mappings per group.
* `vllm.v1.worker.gpu.block_table.BlockTables.num_blocks` (read): what the scheduler
  allocated. Remove when: `ModelState` is shown the block tables.
* `vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch` (called): the graphs for what is
  left of a step behind a cut, as vLLM's own `FastPrefillHelper` asks for them. The state reaches
  the manager, and the block tables, through the runner. Remove when: `ModelState` is shown them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override
from vllm.config import CUDAGraphMode
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from himap_vllm.kernels.stage_slots import write_stage_slots
from himap_vllm.model.install import install
from himap_vllm.plan.prompt import NUM_STAGES
from himap_vllm.plan.step_layout import StepPlan
from himap_vllm.pruning.context import PruningContext
from himap_vllm.pruning.kv_groups import made_groups
from himap_vllm.runner.adapters import AdapterMixin
from himap_vllm.runner.common import count_pruned, count_step, share_metadata
from himap_vllm.runner.v2_stage_buffers import StageBuffers
from himap_vllm.runner.warmup import NUM_TOKENS, warm_up

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:  # the class of vLLM's runner is next in the method resolution order
    _Base = object


class PruningRunnerMixin(AdapterMixin, _Base):
    """Put in front of the runner's own class by `make_pruning_runner`."""

    himap: PruningContext

    @override
    def load_model(self, load_dummy_weights: bool = False, *args: Any, **kwargs: Any) -> None:
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        with DeviceMemoryProfiler() as memory, self.jit_warmup_registry.activate():
            model = get_model_loader(self.load_config).load_model(
                vllm_config=self.vllm_config, model_config=self.model_config
            )
        self.himap = install(model, self.vllm_config)
        model.himap_context = self.himap
        model.get_model_state_cls = lambda: PruningModelState
        super().load_model(load_dummy_weights, *args, model=model, **kwargs)
        self.model_state.himap_runner = weakref.ref(self)
        self.model_memory_usage += memory.consumed_memory


class PruningModelState(DefaultModelState):
    """vLLM's state of a decoder-only model, with stages."""

    himap_runner: weakref.ref[_Base]  # whose state this is; set behind `load_model`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self.himap: PruningContext = model.himap_context
        self._later = StageBuffers(self.max_num_reqs, self.device)
        self._request_ids: list[str] = []

    @override
    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # A step that prunes has fewer tokens behind each cut, so no full graph can hold it.
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            raise ValueError(
                f"himap can't be combined with cudagraph_mode {mode.name}: steps that prune can't "
                "replay a full graph; use FULL_AND_PIECEWISE or FULL_DECODE_ONLY"
            )
        groups = made_groups(kv_cache_config, self.himap.settings, self.model_config)
        self._groups = groups
        later = [(group, stage - 1) for group, stage in enumerate(groups.stages) if stage]
        self._later_groups = torch.tensor(later, device=self.device)

    @property
    def _runner(self) -> Any:
        runner = self.himap_runner()
        assert runner is not None
        return runner

    @property
    def _block_tables(self) -> Any:
        # Not kept: vLLM makes new ones after its trial run, and must be able to free these.
        return self._runner.block_tables

    @override
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
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        full_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        self._begin_step(input_batch, slot_mappings, full_graph)
        stages = self._groups.stages
        if self.himap.stage_metadata is None and self._groups.are_alike:
            stages = [0] * len(stages)  # every stage sees the step as the first one does
        leaders = [self._groups.leaders[stage] for stage in stages]
        metadata: dict[str, Any] = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            [groups if index in leaders else [] for index, groups in enumerate(attn_groups)],
            kv_cache_config,
            for_capture,
            ubatch_idx,
            *args,
            **kwargs,
        )
        share_metadata(
            metadata,
            leaders,
            attn_groups,
            block_tables,
            slot_mappings,
            ubatch_idx,
            replays=full_graph and not for_capture,
        )
        return metadata

    def _begin_step(self, input_batch: Any, slot_mappings: torch.Tensor, full_graph: bool) -> None:
        """Plan a step. Dummy batches have no plans."""
        context, later = self.himap, self._later
        context.end_step()
        plan = context.requests.plans.plan_step(
            input_batch.req_ids,
            input_batch.num_computed_tokens_np,
            input_batch.num_scheduled_tokens,
        )
        if plan is None:
            if full_graph:
                later.copy_first_stage(input_batch.seq_lens)
                context.stage_metadata = [None, *later.metadata(None)]
            return
        later.copy(plan)
        self._write_slots(input_batch.num_reqs, slot_mappings)
        assert not (plan.prunes and full_graph), "a step that prunes can't replay a full graph"
        sizes = self._graph_sizes(plan, input_batch.num_reqs)
        context.begin_step(plan, self.device, later.metadata(plan), sizes)
        self._request_ids = input_batch.req_ids
        blocks = self._block_tables.num_blocks.np
        rows = input_batch.idx_mapping_np
        count_pruned(
            context,
            self._groups,
            plan,
            input_batch.req_ids,
            lambda row: blocks[:, rows[row]].tolist(),
        )

    def _write_slots(self, num_reqs: int, slot_mappings: torch.Tensor) -> None:
        """Slots of the later stages; with 0 requests, padding."""
        tables = self._block_tables
        write_stage_slots(
            self._later_groups,
            self._later.query_start_loc,
            self._later.seq_lens,
            num_reqs,
            tables.input_block_table_ptrs,
            tables.block_table_strides,
            tables.block_sizes_tensor,
            slot_mappings,
        )

    def _graph_sizes(self, plan: StepPlan, num_reqs: int) -> list[int | None]:
        """Return the sizes of the piecewise graphs that vLLM would choose for each stage's size."""
        sizes: list[int | None] = [None] * NUM_STAGES  # the first stage's is chosen by vLLM itself
        # LoRA's kernels read another mapping per stage.
        if not plan.prunes or self.himap.enter_stage is not None:
            return sizes
        dispatch = self._runner.cudagraph_manager.dispatch
        for stage in range(1, NUM_STAGES):
            graph = dispatch(
                num_reqs, plan.stages[stage].num_tokens, uniform_token_count=None,
                num_active_loras=0,
            )  # fmt: skip
            if graph.cg_mode == CUDAGraphMode.PIECEWISE:
                sizes[stage] = graph.num_tokens
        return sizes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile our kernels. Otherwise the first pruned prompt would wait for that."""
        rope = self.rope_state  # only with M-RoPE
        positions = (
            torch.arange(NUM_TOKENS, device=self.device)
            if rope is None
            else rope.get_positions(NUM_TOKENS)
        )
        warm_up(self.himap, self.dtype, self.model_config.get_hidden_size(), positions)
        self._write_slots(0, self._block_tables.slot_mappings)

    @override
    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        super().postprocess_state(*args, **kwargs)
        context = self.himap
        if context.step is not None:
            count_step(context, context.step, self._request_ids)
            context.step = None
