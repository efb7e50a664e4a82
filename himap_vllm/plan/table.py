# SPDX-License-Identifier: Apache-2.0
"""The plans of live requests as arrays, for the few operations that each step needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from himap_vllm.plan.prompt import PromptPlan
from himap_vllm.plan.step_layout import PlanArrays, StepPlan, plan_batch


class ActivePlans:
    """The plans of live requests.

    They are arrays, so that planning a step costs the same few array operations for one planned
    request and for hundreds. Most steps are decode steps.
    """

    _NO_PLAN = 0  # the first row

    def __init__(self) -> None:
        self._row: dict[str, int] = {}
        self._plans: list[PromptPlan | None] = [None]
        self._free: list[int] = []
        self._arrays = PlanArrays.empty(1)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, request_id: str) -> PromptPlan:
        plan = self._plans[self._row[request_id]]
        assert plan is not None
        return plan

    def add(self, request_id: str, plan: PromptPlan) -> None:
        """Remember the plan of a request that has none yet."""
        if not self._free:
            size = len(self._plans)
            grown = PlanArrays.empty(2 * size)
            grown.first_start[:size] = self._arrays.first_start
            grown.last_end[:size] = self._arrays.last_end
            grown.removed[:, :size] = self._arrays.removed
            self._arrays = grown
            self._plans += [None] * size
            self._free = list(range(size, 2 * size))
        row = self._free.pop()
        self._row[request_id] = row
        self._plans[row] = plan
        self._arrays.put(row, plan)

    def discard(self, request_id: str) -> None:
        """Forget a request, planned or not."""
        row = self._row.pop(request_id, None)
        if row is not None:
            self._plans[row] = None
            self._free.append(row)

    def plan_step(
        self,
        request_ids: Sequence[str],
        num_computed: npt.ArrayLike,
        num_scheduled: npt.ArrayLike,
    ) -> StepPlan | None:
        """Return the plan of a batch's step, or None if no request in it has a plan."""
        find = self._row.get
        found = list(map(find, request_ids, repeat(self._NO_PLAN)))
        if not any(found):
            return None
        rows = np.array(found, dtype=np.int64)
        return plan_batch(
            num_computed,
            num_scheduled,
            self._arrays.take(rows),
            lambda row: self._plans[rows[row]],
        )
