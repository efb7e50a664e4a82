# SPDX-License-Identifier: Apache-2.0
"""A mixin for vLLM's workers that follows requests and answers calls.

* `vllm.config.ParallelConfig.worker_cls` (read): `himap_vllm.frontend.support` names our worker
  there when himap is configured. Remove when: vLLM lets an option name the class of the model
  runner.
* `vllm.v1.worker.worker_base.WorkerBase.execute_model` (overridden): every request reaches and
  leaves a worker there, whatever its model runner. Remove when: vLLM tells models of requests that
  come and go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from himap_vllm.pruning.context import PruningContext
from himap_vllm.pruning.request_traces import RequestTrace
from himap_vllm.pruning.trace_log import Attention, Trace

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Base
else:  # vLLM's worker class is next in the method resolution order
    _Base = object


class PruningWorkerMixin(_Base):
    """Put in front of a worker class whose model runner has a `himap`."""

    @property
    def _himap(self) -> PruningContext:
        runner: Any = self.model_runner
        context: PruningContext = runner.himap
        return context

    @override
    def execute_model(self, scheduler_output: Any) -> Any:
        requests, traces = self._himap.requests, self._himap.request_traces
        for request_id in scheduler_output.finished_req_ids:
            requests.on_finished(request_id)
            traces.on_finished(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            requests.on_request(request)
            traces.on_request(request)
        return super().execute_model(scheduler_output)

    def himap_stats(self) -> dict[str, Any]:
        """`PruningStats` as a dict."""
        return self._himap.stats.as_dict()

    def himap_reset_stats(self) -> None:
        """Start the counters anew."""
        self._himap.stats.reset()

    def himap_trace(self, request_id: str) -> Trace | None:
        """Return the positions of a prompt's surviving image tokens; see `TraceLog.find`.

        Known for the latest `trace_requests` pruned prompts.
        """
        found = self._himap.traces.find(request_id)
        return found and found[0]

    def himap_take_trace(self, name: str, scores: bool = True) -> RequestTrace | None:
        """Return the trace of a request by the name that it gave; see `RequestTraces.take`."""
        return self._himap.request_traces.take(name, scores)

    def himap_attention(self, request_id: str) -> Attention | None:
        """Return the attention that the same prompt's image tokens got from the rows that vote."""
        found = self._himap.traces.find(request_id)
        return found and found[1]
