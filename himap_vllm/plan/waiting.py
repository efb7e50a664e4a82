# SPDX-License-Identifier: Apache-2.0
"""Bounds how long a pruned prompt waits for a step with room: others may pass it a few times."""

from __future__ import annotations

PATIENCE = 8
"""Steps in which others may pass a prompt that waits."""


class PassedOver:
    """The prompts that a step had no room for, and whether it may admit those behind them.

    vLLM 0.32 admits nothing behind such a prompt. vLLM 0.33 skips it. Those behind it then run, and
    running requests come first in the next step: prompts of many steps could pass one pruned prompt
    after the other, for ever. After `PATIENCE` such steps nothing is admitted behind it, so those
    ahead of it only decode, and the room comes.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self.closed = False
        """Whether this step admits nothing more."""

    def begin_step(self) -> None:
        """Nothing is known of this step yet."""
        self.closed = False

    def note(self, request_id: str, num_tokens: int) -> None:
        """A waiting prompt gets `num_tokens` tokens in this step; 0: it is passed over."""
        if num_tokens:
            self.forget(request_id)
            return
        passed = self._steps[request_id] = self._steps.get(request_id, 0) + 1
        self.closed |= passed > PATIENCE

    def forget(self, request_id: str) -> None:
        """The prompt runs, or has ended."""
        self._steps.pop(request_id, None)
