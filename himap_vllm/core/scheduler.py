# SPDX-License-Identifier: Apache-2.0
"""The scheduler knows each request's plan, and never splits the one-step part of a pruned prompt.

Seams:

* `vllm.v1.core.sched.scheduler.Scheduler`, `vllm.v1.core.sched.async_scheduler.AsyncScheduler`
  (subclassed): reached through vLLM's `--scheduler-cls` option. Remove when: a request can declare
  a range of its prompt that is computed in one step, and block counts of its own.
* `vllm.v1.core.sched.scheduler.Scheduler.add_request` (overridden): the only place where the
  scheduler and the KV cache managers can learn of a request before its first allocation. Remove
  when: KV cache managers see the request, not its id alone.
* `vllm.v1.core.sched.output.NewRequestData.mm_features` (read): with Model Runner V1, vLLM leaves
  out images that the prefix cache has, and a preempted request may need them again. Remove when:
  vLLM sends them with a request that resumes.
* `vllm.v1.core.sched.scheduler.Scheduler._try_schedule_encoder_inputs` (overridden): may shorten
  or postpone the chunk of any request that has images, for running and waiting requests alike,
  before blocks are allocated. Remove when: a request can declare a range that is not split.
* `vllm.v1.core.sched.scheduler.Scheduler.running`,
  `vllm.v1.core.sched.scheduler.Scheduler.max_num_scheduled_tokens`,
  `vllm.v1.core.sched.scheduler.Scheduler.num_spec_tokens` (read): what room a later step has. Each
  running request ahead may take a token of it, and its drafts. Remove when: a request can declare a
  range that is not split.
* `vllm.v1.core.sched.scheduler.Scheduler.schedule` (overridden): a step begins, for prompts that
  were passed over. Remove when: a request can declare a range that is not split.
* `vllm.v1.core.sched.scheduler.Scheduler._free_request` (overridden): ends every request, finished
  or aborted. Preemption does not pass there, so the plan stays. Remove when: requests carry plugin
  data of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from himap_vllm.config import engine_settings
from himap_vllm.core.kv_cache_manager import make_pruning_manager
from himap_vllm.core.stage_groups import StageGroups
from himap_vllm.plan.prompt import NUM_STAGES, PromptPlan
from himap_vllm.plan.requests import plan_of, stage_layers, step_limit
from himap_vllm.plan.waiting import PassedOver

logger = init_logger("vllm.himap")


if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:  # the scheduler class itself is next in the method resolution order
    _Base = object


class _PruningMixin(_Base):
    """What both schedulers add."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = engine_settings(self.vllm_config.additional_config)
        assert settings is not None, "this scheduler is chosen only with himap settings"
        manager = self.kv_cache_manager
        groups = StageGroups.of(
            manager.kv_cache_config, stage_layers(settings, self.vllm_config.model_config)
        )
        logger.info(
            "HiMAP: cuts before layers %d and %d; KV cache groups per stage: %s, with blocks of %s "
            "tokens",
            settings.shallow_layer,
            settings.deep_layer,
            [groups.stages.count(stage) for stage in range(NUM_STAGES)],
            groups.block_sizes,
        )
        _, self.himap_step_limit = step_limit(self.scheduler_config)
        self.himap_step_budget = min(
            self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens
        )
        self.himap_plans: dict[str, PromptPlan] = {}
        self.himap_passed = PassedOver()
        self.himap_prefixes = make_pruning_manager(
            manager,
            groups.stages,
            self.himap_plans,
            self.himap_passed,
            get_hash_fn_by_name(self.vllm_config.cache_config.prefix_caching_hash_algo),
        )

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.himap_passed.begin_step()
        output = super().schedule(*args, **kwargs)
        if not self.use_v2_model_runner:
            self._keep_images(output)
        return output

    def _keep_images(self, output: Any) -> None:
        """Leave new requests their images, also those that the prefix cache has.

        The worker gets them once. A preempted request needs them again if its blocks are evicted.
        """
        for new in output.scheduled_new_reqs:
            if new.num_computed_tokens and new.mm_features:
                new.mm_features = self.requests[new.req_id].mm_features

    @override
    def add_request(self, request: Request) -> None:
        plan = plan_of(request.num_prompt_tokens, request.mm_features, request.sampling_params)
        # A known id is the next chunk of a streaming-input session, which is never pruned.
        if plan is not None and request.request_id not in self.requests:
            self.himap_plans[request.request_id] = plan
        super().add_request(request)

    @override
    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        # vLLM's answer, without its search: images are part of the prompt.
        if num_computed_tokens >= request.num_prompt_tokens:
            return [], num_new_tokens, encoder_compute_budget, [], []
        plan = self.himap_plans.get(request.request_id)
        schedule = super()._try_schedule_encoder_inputs
        if plan is None:
            result: tuple[Any, ...] = schedule(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget,
                *args, **kwargs,
            )  # fmt: skip
            return result
        limit = self.himap_step_limit
        ahead = len(self.running) - (request.status is RequestStatus.RUNNING)
        ahead *= 1 + self.num_spec_tokens  # with the drafts that each may bring
        later = min(limit, self.himap_step_budget - ahead)
        chunk = plan.chunk(num_computed_tokens, num_new_tokens, limit, later)
        result = schedule(
            request, num_computed_tokens, chunk, encoder_compute_budget, *args, **kwargs
        )
        allowed = plan.chunk(num_computed_tokens, result[1], limit, later)
        if allowed == 0 and _inside_image(request, num_computed_tokens):
            # The image keeps its place in the encoder cache until it is computed, so the next step
            # would have no more room for the unit's.
            allowed = plan.chunk(num_computed_tokens, result[1], 0, 0)
        if allowed != result[1]:
            # The step has room for the prompt, but not for all its images, so the images wait.
            # Release what they pinned in the encoder cache, or two waiting prompts could block each
            # other.
            self.encoder_cache_manager.free(request)
            result = schedule(
                request, num_computed_tokens, allowed, encoder_compute_budget, *args, **kwargs
            )
        if request.status is not RequestStatus.RUNNING:
            self.himap_passed.note(request.request_id, result[1])
        return result

    @override
    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)  # needs the plan
        if self.himap_plans.pop(request.request_id, None) is not None:
            self.himap_prefixes.forget(request.request_id)
        self.himap_passed.forget(request.request_id)
        return result


def _inside_image(request: Request, num_tokens: int) -> bool:
    """Whether the first `num_tokens` tokens end inside an image."""
    places = (feature.mm_position for feature in request.mm_features)
    return any(place.offset < num_tokens < place.offset + place.length for place in places)


class PruningScheduler(_PruningMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class PruningAsyncScheduler(_PruningMixin, AsyncScheduler):
    """For engines with async scheduling."""
