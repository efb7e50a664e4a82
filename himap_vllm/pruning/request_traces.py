# SPDX-License-Identifier: Apache-2.0
"""What survived in the prompts of requests that asked for it (`himap_trace`).

A step in which no such prompt is pruned does nothing here. In another one the rows that survive are
copied to the host without waiting for the device. They are read when the trace is taken, between
two steps.

* `vllm.utils.gpu_sync_debug.gpu_sync_allowed` (called): tells vLLM's check for waits that this wait
  is wanted. Remove when: vLLM drops that check.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from himap_vllm.plan.requests import read_stamp

if TYPE_CHECKING:
    from himap_vllm.plan.prompt import PromptPlan
    from himap_vllm.pruning.pruning_step import PruningStep

_MAX_TRACES = 256
"""That wait to be taken. Each holds a few bytes for each token of the steps that pruned it."""


class RequestTrace(TypedDict):
    """What survived of each image, in prompt order.

    Attributes:
        kept: [cut][image] ascending indices among the image's tokens.
        scores: [cut][image] of each of the image's tokens, the score by which the cut chose; None
            for a token that did not come to the cut. Empty if nobody wants them.

    Both have None for an image of which nothing was to be dropped.
    """

    kept: list[list[list[int] | None]]
    scores: list[list[list[float | None] | None]]


class _StepCopy:
    """The survivors and scores of a step's cuts, on their way to the host."""

    def __init__(self, step: PruningStep) -> None:
        first, second = step.cuts
        tensors = [  # rows of the step before the first cut, and scores of some
            first.survivors,
            first.survivors[second.survivors],
            first.image_tokens,
            first.survivors[second.image_tokens],
            first.scores,
            second.scores,
        ]
        on_device = first.survivors.is_cuda
        self._host = [torch.empty_like(t, device="cpu", pin_memory=on_device) for t in tensors]
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if on_device:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[npt.NDArray[Any]]:
        """[survivors of both cuts, rows with scores of both, these scores], once they are here."""
        if self._copied is not None:
            with gpu_sync_allowed():
                self._copied.synchronize()
        return [tensor.numpy() for tensor in self._host]


@dataclass
class _Traced:
    """A request whose trace is wanted.

    Attributes:
        request_id: whose it is.
        plan: of its prompt.
        units: by index in the plan, the copy of the latest step that pruned the unit, and what to
            add to a row of that step for a position in the prompt.
    """

    request_id: str
    plan: PromptPlan
    units: dict[int, tuple[_StepCopy, int]] = field(default_factory=dict)

    def trace(self, with_scores: bool) -> RequestTrace:
        """Read the copies."""
        size = self.plan.num_prompt_tokens
        kept = np.zeros((2, size), dtype=bool)
        scores = np.full((2, size), np.nan)
        for index, (copy, offset) in self.units.items():
            unit = self.plan.units[index]
            begin, end = unit.start - offset, unit.end - offset
            first, deep, *scored = copy.read()
            for cut, rows in enumerate((first, deep)):
                own = rows[(rows >= begin) & (rows < end)]
                kept[cut, own + offset] = True
                rows, values = scored[cut], scored[cut + 2]
                own = (rows >= begin) & (rows < end)
                scores[cut, rows[own] + offset] = values[own]
        pruned = {image for index in self.units for image in self.plan.units[index].images}
        found: RequestTrace = {"kept": [[], []], "scores": [[], []]}
        for image in self.plan.images:
            tokens = np.concatenate([np.arange(*run) for run in image.runs])
            chosen = image in pruned
            for cut in range(2):
                left = kept[cut, tokens].nonzero()[0].tolist() if chosen else None
                found["kept"][cut].append(left)
                if with_scores:
                    of_image = _numbers(scores[cut, tokens]) if chosen else None
                    found["scores"][cut].append(of_image)
        return found


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


class RequestTraces:
    """The traces that live or ended requests asked for, until they are taken."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of live requests, by their id
        self._traced: OrderedDict[str, _Traced] = OrderedDict()  # by name
        self._latest: tuple[PruningStep, _StepCopy] | None = None

    def on_request(self, request: Any) -> None:
        """Note a request that has arrived (vLLM's `NewRequestData`)."""
        name = read_stamp(request.sampling_params).trace
        if name is not None:
            self._names[request.req_id] = name

    def on_finished(self, request_id: str) -> None:
        """Note a request that has ended. Its trace can still be taken."""
        self._names.pop(request_id, None)
        self._latest = None  # it would hold the tensors of its step

    def on_pruned(self, request_id: str, plan: PromptPlan, step: PruningStep, index: int) -> None:
        """Copy what survived of a pruned unit, if its prompt is traced.

        Args:
            request_id: of the prompt.
            plan: of the prompt.
            step: whose forward pass was launched.
            index: of the unit in `StepPlan.pruned_units`.
        """
        name = self._names.get(request_id)
        if name is None:
            return
        if self._latest is None or self._latest[0] is not step:  # one copy serves all its prompts
            self._latest = step, _StepCopy(step)
        traced = self._traced.get(name)
        if traced is None or traced.request_id != request_id:  # another one had the name
            self._traced.pop(name, None)  # and its place in the queue
            traced = self._traced[name] = _Traced(request_id, plan)
        unit = step.plan.pruned_units[index]
        offset = plan.units[unit.index].end - unit.tokens.stop
        traced.units[unit.index] = self._latest[1], offset
        while len(self._traced) > _MAX_TRACES:
            self._traced.popitem(last=False)

    def take(self, name: str, scores: bool = True) -> RequestTrace | None:
        """Return a trace, and forget it; None if nothing was pruned, or many came after it."""
        self._latest = None
        traced = self._traced.pop(name, None)
        return None if traced is None else traced.trace(scores)
