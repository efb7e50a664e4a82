# SPDX-License-Identifier: Apache-2.0
"""Answers of vLLM's handlers: streams that nobody reads are closed, failures are told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from himap_server.errors import GatewayError
from himap_server.record import RequestRecord
from himap_server.routes.answer import answer
from himap_server.schemas import ChatRequest

REFUSAL = (
    'data: {"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}\n\n'
)
REQUEST: Any = SimpleNamespace(headers={})
MODEL: Any = SimpleNamespace(
    pruning=SimpleNamespace(apply=lambda *_: None), tracer=SimpleNamespace(ask=lambda *_: None)
)


class Handler:
    """A handler of vLLM whose streams note how they end."""

    def __init__(self, record: RequestRecord, failures: int, event: str) -> None:
        self.open = 0
        self._record, self._failures, self._event = record, failures, event

    async def __call__(self, *_: Any) -> AsyncIterator[str]:
        return self._stream()

    async def _stream(self) -> AsyncIterator[str]:
        self.open += 1
        self._record.failed_at_once = self._failures > 0
        self._failures -= 1
        try:
            yield self._event
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


async def ask(failures: int, event: str = "data: {}\n\n") -> tuple[Handler, Any]:
    record = RequestRecord("id", "POST", images=1)
    handler = Handler(record, failures, event)
    body = ChatRequest(messages=[{"role": "user", "content": "a"}], stream=True)
    try:
        return handler, await answer(handler, body, REQUEST, MODEL, record)
    except GatewayError as error:
        return handler, error


@pytest.mark.parametrize(("failures", "is_open"), [(0, 1), (1, 1), (2, 0)])
def test_failed_attempts(failures: int, is_open: int) -> None:
    async def scenario() -> None:
        handler, response = await ask(failures)
        assert isinstance(response, StreamingResponse if is_open else GatewayError)
        assert handler.open == is_open

    asyncio.run(scenario())


def test_a_refusal() -> None:
    async def scenario() -> None:
        handler, response = await ask(0, REFUSAL)
        assert response.status_code == 400
        assert handler.open == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("generated", "error", "status"),
    [
        (0, ValueError("top_p must be in (0, 1]"), 400),
        (0, AttributeError("no prompt"), 400),
        (3, ValueError("Out of range float values are not JSON compliant"), 500),
        (3, AttributeError("no tool"), 500),
    ],
)
def test_what_fails_behind_the_engine_is_no_fault_of_the_request(
    generated: int, error: Exception, status: int
) -> None:
    record = RequestRecord("id", "POST")
    body = ChatRequest(messages=[{"role": "user", "content": "a"}])

    async def handler(*_: Any) -> Any:
        record.prompt_tokens = record.completion_tokens = generated
        raise error

    async def scenario() -> int:
        try:
            return (await answer(handler, body, REQUEST, MODEL, record)).status_code
        except GatewayError as refusal:
            return refusal.status_code

    assert asyncio.run(scenario()) == status
