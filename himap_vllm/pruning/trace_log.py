# SPDX-License-Identifier: Apache-2.0
"""The positions of the image tokens that survived in the latest pruned prompts."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm.utils.gpu_sync_debug import gpu_sync_allowed

if TYPE_CHECKING:
    from himap_vllm.plan.prompt import PromptPlan
    from himap_vllm.pruning.step import PruningStep

Trace = dict[str, list[list[int]]]
"""Surviving prompt positions per image: {"shallow": [[...], ...], "deep": [[...], ...]}."""


class TraceLog:
    """The traces of the latest `size` pruned prompts. A size of 0 keeps none and costs nothing.

    * `vllm.utils.gpu_sync_debug.gpu_sync_allowed` (called): tells vLLM's check for waits that this
      copy to the host is wanted. Remove when: vLLM drops that check.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def find(self, request_id: str) -> Trace | None:
        """The trace of a request, if it is known.

        vLLM adds a random suffix to request ids. `request_id` may be given without it.
        """
        for known, trace in reversed(self._traces.items()):
            if known == request_id or known.rpartition("-")[0] == request_id:
                return dict(trace)
        return None

    def on_pruned(self, request_id: str, plan: PromptPlan, step: PruningStep, row: int) -> None:
        """Record a pruned prompt, after the forward pass of its step was launched.

        Args:
            request_id: of the prompt.
            plan: of the prompt.
            step: the step.
            row: of the prompt in the batch.
        """
        if not self._size:
            return
        first, second = (cut.survivors for cut in step.cuts)
        batch = step.plan.stages[0]
        begin = batch.query_start_loc[row]
        offset = int(batch.seq_lens[row] - batch.query_start_loc[row + 1])
        trace: Trace = {}
        with gpu_sync_allowed():
            kept = {"shallow": first.tolist(), "deep": first[second].tolist()}
        for name, rows in kept.items():
            alive = {row + offset for row in rows if row >= begin}
            trace[name] = [
                [p for run in image.runs for p in range(*run) if p in alive]
                for image in plan.images
            ]
        self._traces[request_id] = trace
        while len(self._traces) > self._size:
            self._traces.popitem(last=False)
