# SPDX-License-Identifier: Apache-2.0
"""What survived in the latest pruned prompts, and the attention that it was chosen by."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm.utils.gpu_sync_debug import gpu_sync_allowed

if TYPE_CHECKING:
    from himap_vllm.plan.prompt import PromptPlan
    from himap_vllm.pruning.step import PruningStep

Trace = dict[str, list[list[int]]]
"""Surviving prompt positions per image: {"shallow": [[...], ...], "deep": [[...], ...]}."""


Attention = dict[str, list[list[float]]]
"""Sums of attention per image, of each of its tokens that came to the cut; keys as in `Trace`."""


class TraceLog:
    """The traces of the latest `size` pruned prompts. A size of 0 keeps none and costs nothing.

    * `vllm.utils.gpu_sync_debug.gpu_sync_allowed` (called): tells vLLM's check for waits that this
      copy to the host is wanted. Remove when: vLLM drops that check.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._traces: OrderedDict[str, tuple[Trace, Attention]] = OrderedDict()

    def find(self, request_id: str) -> tuple[Trace, Attention] | None:
        """The trace of a request and its image tokens' attention, if it is known.

        vLLM adds a random suffix to request ids. `request_id` may be given without it.
        """
        for known, found in reversed(self._traces.items()):
            if known == request_id or known.rpartition("-")[0] == request_id:
                return found
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
        self._traces[request_id] = trace, _attention(step, row)
        while len(self._traces) > self._size:
            self._traces.popitem(last=False)


def _attention(step: PruningStep, row: int) -> Attention:
    """The attention of a prompt's image tokens, at cuts whose criterion has voters."""
    found: Attention = {}
    for name, cut in zip(("shallow", "deep"), step.cuts, strict=True):
        if cut.attention is None:
            continue
        (request,) = (request for request in cut.cut.requests if request.request == row)
        with gpu_sync_allowed():
            own = cut.attention[request.image_tokens].tolist()
        found[name] = [own[vote.tokens] for vote in request.votes]
    return found
