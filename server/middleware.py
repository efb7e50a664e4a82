# SPDX-License-Identifier: Apache-2.0
"""Around every request: its id, whether it may enter, and the count of those in flight."""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response
from .lifecycle import Lifecycle

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestGate:
    """Pure ASGI middleware (nothing is buffered).

    Takes `X-Request-Id` or makes one, and echoes it. The engine gets an id of its own for every
    request: clients may repeat theirs.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._take_request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send_with_id)
            return
        if (reason := self._lifecycle.refusal()) is not None:
            refusal = error_response(
                503, reason, type_="service_unavailable", headers={"retry-after": "5"}
            )
            await refusal(scope, receive, send_with_id)
            return
        self._lifecycle.in_flight += 1
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._lifecycle.in_flight -= 1

    @staticmethod
    def _take_request_id(scope: Scope) -> str:
        headers: list[Any] = scope["headers"]
        given = [value for name, value in headers if name == REQUEST_ID_HEADER.encode()]
        scope["headers"] = [pair for pair in headers if pair[0] != REQUEST_ID_HEADER.encode()]
        if len(given) == 1 and _ACCEPTED_ID.fullmatch(given[0]):
            return bytes(given[0]).decode()
        return uuid.uuid4().hex
