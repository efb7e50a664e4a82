# SPDX-License-Identifier: Apache-2.0
"""What survived in the prompts of requests that asked for it (`himap_trace`).

A step in which no such prompt is pruned does nothing here. In another one the rows that survive are
copied to the host without waiting for the device. They are read when the trace is taken, later.
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
    from himap_vllm.pruning.step import PruningStep

_MAX_TRACES = 256  # that wait to be taken; each holds a few bytes for each token of a step


class RequestTrace(TypedDict):
    """What survived of each image, in prompt order.

    Attributes:
        kept: [cut][image] ascending indices among the image's tokens.
        scores: [cut][image] of each of the image's tokens, the score by which the cut chose; None
            for a token that did not come to the cut.

    Both have None for an image of which no step of the request chose: nothing was to be dropped, or
    it came from the prefix cache.
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
        plan: of its prompt.
        steps: its steps that pruned: the copy, its rows [begin, end) in the step, and what makes a
            position in the prompt of a row.
    """

    plan: PromptPlan
    steps: list[tuple[_StepCopy, int, int, int]] = field(default_factory=list)

    def trace(self) -> RequestTrace:
        """Read the copies; a later one of the same rows counts."""
        # Steps that recompute a prompt have the tokens behind it, too.
        size = max(end + offset for _, _, end, offset in self.steps)
        kept = np.zeros((2, size), dtype=bool)
        seen = np.zeros(max(size, self.plan.num_prompt_tokens), dtype=bool)
        scores = np.full((2, size), np.nan)
        for copy, begin, end, offset in self.steps:
            place = slice(begin + offset, end + offset)
            kept[:, place], scores[:, place], seen[place] = False, np.nan, True
            first, deep, *scored = copy.read()
            for cut, rows in enumerate((first, deep)):
                own = rows[(rows >= begin) & (rows < end)]
                kept[cut, own + offset] = True
                rows, values = scored[cut], scored[cut + 2]
                own = (rows >= begin) & (rows < end)
                scores[cut, rows[own] + offset] = values[own]
        found: RequestTrace = {"kept": [[], []], "scores": [[], []]}
        for image in self.plan.images:
            tokens = np.concatenate([np.arange(*run) for run in image.runs])
            chosen = bool(seen[tokens].all())
            for cut in range(2):
                left = kept[cut, tokens].nonzero()[0].tolist() if chosen else None
                found["kept"][cut].append(left)
                found["scores"][cut].append(_numbers(scores[cut, tokens]) if chosen else None)
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

    def on_pruned(self, request_id: str, plan: PromptPlan, step: PruningStep, row: int) -> None:
        """Copy what survived of a prompt in a step that prunes a unit of it, if it is traced.

        Args:
            request_id: of the prompt.
            plan: of the prompt.
            step: whose forward pass was launched.
            row: of the prompt in the batch.
        """
        name = self._names.get(request_id)
        if name is None:
            return
        if self._latest is None or self._latest[0] is not step:  # one copy serves all its prompts
            self._latest = step, _StepCopy(step)
        batch = step.plan.stages[0]
        begin, end = (int(place) for place in batch.query_start_loc[row : row + 2])
        traced = self._traced.setdefault(name, _Traced(plan))
        rows = self._latest[1], begin, end, int(batch.seq_lens[row]) - end
        if rows not in traced.steps[-1:]:  # a step may prune several units of a prompt
            traced.steps.append(rows)
        while len(self._traced) > _MAX_TRACES:
            self._traced.popitem(last=False)

    def take(self, name: str) -> RequestTrace | None:
        """Return a trace, and forget it; None if nothing was pruned, or many came after it."""
        self._latest = None
        traced = self._traced.pop(name, None)
        return None if traced is None else traced.trace()
