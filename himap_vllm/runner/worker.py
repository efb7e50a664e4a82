# SPDX-License-Identifier: Apache-2.0
"""What every pruning worker adds to vLLM's: it tells the recorder of requests, and answers calls.

vLLM seams (0.32): `parallel_config.worker_cls`, set by `himap_vllm.frontend.support` when himap is
configured; `execute_model`, through which every request reaches and leaves a worker, whatever its
model runner. `collective_rpc` (public, on `LLM` and `AsyncLLM`) reaches the two calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from himap_vllm.pruning.live_requests import Recorder, Trace

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Base
else:  # vLLM's worker class is next in the method resolution order
    _Base = object


class PruningWorkerMixin(_Base):
    """Put in front of a worker class whose model runner has a `himap`."""

    def _himap_recorder(self) -> Recorder:
        runner: Any = self.model_runner
        recorder: Recorder = runner.himap.recorder
        return recorder

    def execute_model(self, scheduler_output: Any) -> Any:
        recorder = self._himap_recorder()
        for request_id in scheduler_output.finished_req_ids:
            recorder.forget(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            recorder.see_request(request)
        return super().execute_model(scheduler_output)

    def himap_stats(self) -> dict[str, Any]:
        """`PruningStats` as a dict."""
        return self._himap_recorder().stats.as_dict()

    def himap_trace(self, request_id: str) -> Trace | None:
        """Surviving prompt positions per image: {"shallow": [[...], ...], "deep": [[...], ...]}.

        Known for the latest `trace_requests` pruned prompts. vLLM adds a random suffix to request
        ids on their way in; the id may be given without it.
        """
        for known, trace in reversed(self._himap_recorder().traces.items()):
            if known == request_id or known.rpartition("-")[0] == request_id:
                return dict(trace)
        return None
