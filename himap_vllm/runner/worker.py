# SPDX-License-Identifier: Apache-2.0
"""Worker classes: vLLM's own, with a pruning model runner and two calls for the outside.

vLLM seam: `parallel_config.worker_cls`, set by `himap_vllm.support` when himap is configured.
`collective_rpc` (public, on `LLM` and `AsyncLLM`) reaches the two calls.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from himap_vllm.runner import v1


class PruningCPUWorker(CPUWorker):
    """`CPUWorker` with Model Runner V1."""

    def init_device(self) -> None:
        super().init_device()
        v1.adopt(self.model_runner)

    def himap_stats(self) -> dict[str, Any]:
        """`PruningStats` as a dict."""
        stats: dict[str, Any] = self.model_runner.himap.stats.as_dict()
        return stats

    def himap_trace(self, request_id: str) -> v1.Trace | None:
        """Surviving prompt positions per image: {"shallow": [[...], ...], "deep": [[...], ...]}.

        Known for the latest `trace_requests` pruned prompts. vLLM adds a random suffix to request
        ids on their way in; the id may be given without it.
        """
        for known, trace in reversed(self.model_runner.himap_traces.items()):
            if known == request_id or known.rpartition("-")[0] == request_id:
                return dict(trace)
        return None
