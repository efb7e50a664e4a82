# SPDX-License-Identifier: Apache-2.0
"""The record of one request: filled in on its way, read by metrics, the log and the answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from vllm.outputs import RequestOutput

from himap_vllm.plan.savings import ImageSavings, PromptSavings

from .errors import Reason
from .security.keys import Key

if TYPE_CHECKING:
    from .tracing.tracer import AskedTrace

Detail = Literal["auto", "low", "high", "original"]
"""OpenAI's word for how carefully the model is to look at an image; `original` is as `high`."""

DETAILS: tuple[Detail, ...] = get_args(Detail)

current: ContextVar[RequestRecord] = ContextVar("himap_request")
"""The record of the request that this task works for, or that the task's creator works for.

The request middleware sets it. Only the code that vLLM calls without an HTTP request (engine.py,
prompts.py) reads it; routes take `RecordDep` (gateway.py).
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """Size of an image in pixels, upright, and the factor by which it is scaled down."""

    width: int
    height: int
    factor: int


@dataclass(slots=True)
class RequestRecord:
    """One request to `/v1`. Times are in seconds; `None` if the request never got that far.

    Attributes:
        request_id: the client's `X-Request-Id`, or the id that the gateway made.
        route: the path as the app declares it, "" if there is none. The number of routes is fixed,
            so metrics can have it as a label.
        key: the API key.
        status: HTTP status; 499 if the client went away before its answer was complete. If a stream
            failed after its 200, the status in the error that ended it.
        reason: why it was not answered.
        received: from the request's arrival to the last byte of its body.
        overhead: from that byte to vLLM's handler, without fetching images.
        fetching: for fetching images.
        decoding: for decoding images into pixels, in threads; the sum over the images.
        queued: longest wait of one of its prompts for the scheduler.
        time_to_first_token: from the request's arrival to the first prompt's first token.
        time_per_output_token: mean over the tokens after the first, of all its prompts.
        details: of each image, in the order of the prompt.
        urls: of each image, in the order of the prompt: those of the store.
        pictures: by these URLs, once they are decoded.
        trace: what it asks for, if it asks where its kept image tokens lie.
        prompt_tokens: of all its prompts, image tokens included.
        image_tokens: of these, those of images.
        cached_tokens: of `prompt_tokens`, those read from the prefix cache.
        savings: of each prompt with images.
        next_event: number of the next event, if it is a stream of the Responses API.
        asked: whether it says itself how it is to be pruned.
        beam_search: whether vLLM makes a new request of each of its steps.
        failed_at_once: the engine's first output for one of its prompts was an error.
    """

    request_id: str
    method: str
    route: str = ""
    key: Key | None = None
    status: int = 0
    reason: Reason | None = None
    received: float = 0.0
    overhead: float | None = None
    fetching: float = 0.0
    decoding: float = 0.0
    images: int = 0
    details: list[Detail] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    trace: AskedTrace | None = None
    stream: bool = False
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queued: float | None = None
    time_to_first_token: float | None = None
    duration: float = 0.0
    savings: list[PromptSavings] = field(default_factory=list)
    next_event: int | None = None
    asked: bool = False
    beam_search: bool = False
    failed_at_once: bool = False
    started: float = field(default_factory=time.perf_counter)
    _generating: float = 0.0
    _generated: int = 0

    @property
    def elapsed(self) -> float:
        """Time since the request's arrival."""
        return time.perf_counter() - self.started

    @property
    def pruned(self) -> bool:
        """Whether any of its prompts was pruned."""
        return any(prompt.kept_deep < prompt.image_tokens for prompt in self.savings)

    @property
    def time_per_output_token(self) -> float | None:
        """See the class."""
        return self._generating / self._generated if self._generated else None

    def hand_over(self) -> None:
        """Note that the gateway's own work is done, before vLLM's handler is called."""
        self.overhead = self.elapsed - self.received - self.fetching

    def start_over(self) -> None:
        """Forget what the engine did for it, before another attempt."""
        self.failed_at_once = False
        self.prompt_tokens = self.image_tokens = self.cached_tokens = self.completion_tokens = 0
        self.time_to_first_token = self.queued = None
        self.savings.clear()

    def usage(self) -> dict[str, Any] | None:
        """`usage.himap` of all its prompts together; None if no prompt had images."""
        if not self.savings:
            return None
        total = sum(self.savings[1:], self.savings[0])
        usage = total.as_usage()
        usage["images"] = [
            {"detail": detail, **asdict(image)} for detail, image in self.images_by_detail()
        ]
        return usage

    def images_by_detail(self) -> Iterator[tuple[Detail, ImageSavings]]:
        """Each image of its prompts, as the engine saw it."""
        for prompt in self.savings:
            yield from zip(self.details, prompt.images, strict=False)

    def picture(self, index: int) -> Picture | None:
        """The size of an image, by its place in the prompt; None if it is not known."""
        return self.pictures.get(self.urls[index]) if index < len(self.urls) else None

    async def watch(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[RequestOutput]:
        """Pass on what the engine yields for one prompt, and record its tokens and times."""
        last: RequestOutput | None = None
        tokens = 0
        try:
            async for output in outputs:
                if last is None:
                    self._first_output(output)
                # A stream has deltas; any other answer has all tokens in its only output.
                tokens += sum(len(completion.token_ids) for completion in output.outputs)
                last = output
                yield output
        finally:  # also if the client goes away
            if last is not None:
                # Later steps of a beam search find the prompt in the cache, once for each beam.
                if not (self.beam_search and self.completion_tokens):
                    self.cached_tokens += last.num_cached_tokens or 0
                self.completion_tokens += tokens
                stats: Any = last.metrics
                if stats is not None:  # None: --disable-log-stats
                    self._generating += stats.last_token_ts - stats.first_token_ts
                    self._generated += max(0, stats.num_generation_tokens - 1)

    def _first_output(self, output: RequestOutput) -> None:
        self.failed_at_once |= any(
            completion.finish_reason == "error" for completion in output.outputs
        )
        stats: Any = output.metrics
        if stats is None:
            return
        # Without streaming, the first output is the whole answer.
        first = self.elapsed - (stats.last_token_ts - stats.first_token_ts)
        self.time_to_first_token = min(self.time_to_first_token or first, first)
        self.queued = max(self.queued or 0.0, stats.scheduled_ts - stats.queued_ts)
