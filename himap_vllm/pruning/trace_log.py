# SPDX-License-Identifier: Apache-2.0
"""What survived in the latest pruned prompts, and the attention that it was chosen by."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm.utils.gpu_sync_debug import gpu_sync_allowed

if TYPE_CHECKING:
    from himap_vllm.plan.prompt import PromptPlan
    from himap_vllm.pruning.pruning_step import PruningStep

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

    def on_pruned(self, request_id: str, plan: PromptPlan, step: PruningStep, index: int) -> None:
        """Record a pruned unit, after the forward pass of its step was launched.

        Args:
            request_id: of the prompt.
            plan: of the prompt.
            step: the step.
            index: of the unit in `StepPlan.pruned_units`.
        """
        if not self._size:
            return
        if request_id not in self._traces:
            self._traces[request_id] = _empty(plan), {}
            while len(self._traces) > self._size:
                self._traces.popitem(last=False)
        trace, attention = self._traces[request_id]
        pruned = step.plan.pruned_units[index]
        unit = plan.units[pruned.index]
        first_image = plan.images.index(unit.images[0])
        images = slice(first_image, first_image + len(unit.images))
        first, second = (cut.survivors for cut in step.cuts)
        offset = unit.end - pruned.tokens.stop  # from rows of the step to places in the prompt
        with gpu_sync_allowed():
            kept = {"shallow": first.tolist(), "deep": first[second].tolist()}
        for name, rows in kept.items():
            alive = {row + offset for row in rows}
            trace[name][images] = [
                [p for run in image.runs for p in range(*run) if p in alive]
                for image in unit.images
            ]
        for name, cut in zip(kept, step.cuts, strict=True):
            if cut.attention is not None:
                at_cut = cut.cut.units[index]
                with gpu_sync_allowed():
                    own = cut.attention[at_cut.image_tokens].tolist()
                of_images = attention.setdefault(name, [[] for _ in plan.images])
                of_images[images] = [own[vote.tokens] for vote in at_cut.votes]


def _empty(plan: PromptPlan) -> Trace:
    """Before any unit is pruned: images outside of units are whole, nothing is known of others."""
    pruned = {image for unit in plan.units for image in unit.images}
    whole = [
        [] if image in pruned else [p for run in image.runs for p in range(*run)]
        for image in plan.images
    ]
    return {"shallow": [*whole], "deep": [*whole]}
