# SPDX-License-Identifier: Apache-2.0
"""What every request to `/v1` passes: its id, phase, API key, limits and body; then its log line.

Pure ASGI. The middleware reads the whole body, within its limits; it does not buffer answers. One
task runs the app, another waits for the client to go away. When the client goes away, or the
request's time is up, the app's task is cancelled, and with it the engine's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import retries
from .errors import GatewayError, Reason, body_of, error_event, error_response
from .lifecycle import Lifecycle, Phase
from .record import RequestRecord, current
from .security.keys import Key, KeyRing
from .security.limits import KeyLimits

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED_ID = re.compile(r"[\x21-\x7e]{1,128}")
_SLASHES = re.compile("/{2,}")
_CLIENT_WENT_AWAY = 499  # nginx's status for it, in the log and the metrics only
_LAST_WORDS_SECONDS = 5.0
_RETRY_SECONDS = 5
_MAX_HEADERS = 200
_MAX_HEADER_BYTES = 64 << 10
_OURS = (REQUEST_ID_HEADER.encode(), b"authorization")
_DONE = b"data: [DONE]\n\n"
_LAST_EVENTS = tuple(
    f"event: response.{end}\n".encode() for end in ("completed", "incomplete", "failed")
)


class RequestMiddleware:
    """ASGI middleware around the app.

    It takes `X-Request-Id` or makes one, and returns it with the answer. The engine gets another id
    for every request, because clients may repeat theirs.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        *,
        keys: KeyRing | None,
        limits: KeyLimits | None = None,
        max_body_bytes: int,
        request_timeout: float,
        root_path: str = "",
        report: Callable[[RequestRecord], None],
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._keys = keys
        self._limits = limits or KeyLimits()
        self._max_body_bytes = max_body_bytes
        self._timeout = request_timeout
        self._root = "" if not root_path else _plain_path(root_path).rstrip("/")
        self._report = report
        self._retries = retries.Retries()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _plain_path(scope["path"])
        if self._root and f"{path}/".startswith(f"{self._root}/"):  # a proxy may take it off
            path = path[len(self._root) :] or "/"
        # The router takes off one root: with it, the router sees the path that is checked here.
        scope = {**scope, "path": self._root + path, "root_path": self._root}
        headers = Headers(scope=scope)
        pairs = scope["headers"]
        too_large = len(pairs) > _MAX_HEADERS or sum(map(len, chain(*pairs))) > _MAX_HEADER_BYTES
        request_id = _request_id(headers)
        answer = ResponseTracker(send, request_id, self._when_to_retry)
        record = RequestRecord(request_id, scope["method"])
        if scope["method"] == "HEAD":
            scope["method"] = "GET"  # uvicorn knows that no body may follow
        if not path.startswith("/v1/"):
            await self._app(scope, receive, answer)
            return
        token = current.set(record)
        inner = {
            **scope,
            # vLLM would name the engine's request after the id, and has no use for the key.
            "headers": [pair for pair in pairs if pair[0] not in _OURS],
            "state": {**scope.get("state", {}), "record": record},  # `request.state.record`
        }
        try:
            if too_large:
                raise GatewayError(431, "the headers are too large", reason=Reason.HEADERS)
            if _is_websocket(scope, headers):
                raise GatewayError(
                    426,
                    "this server has no WebSockets: send a POST and set `stream`",
                    reason=Reason.WEBSOCKET,
                    headers={"upgrade": "HTTP/1.1", "connection": "upgrade"},
                )
            await self._admit(inner, headers, receive, answer, record)
        except _ClientGoneError:
            record.status = record.status or _CLIENT_WENT_AWAY
        except GatewayError as error:
            record.reason, record.status = error.reason, error.status_code
            # A client that has stopped reading must not block this.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    await _refuse(error, inner, receive, answer)
        finally:
            current.reset(token)
            record.route = getattr(inner.get("route"), "path_format", "")
            record.status = record.status or (answer.status if answer.complete else 500)
            record.duration = record.elapsed
            if record.completion_tokens:
                self._retries.answered(record.started, time.perf_counter())
            self._report(record)

    async def _admit(
        self,
        scope: Scope,
        headers: Headers,
        receive: Receive,
        answer: ResponseTracker,
        record: RequestRecord,
    ) -> None:
        if (reason := self._lifecycle.refusal()) is not None:
            raise GatewayError(
                503, reason, reason=Reason(self._lifecycle.phase.value), retry_after=_RETRY_SECONDS
            )
        async with contextlib.AsyncExitStack() as place:
            record.key = self._authenticate(headers)
            if record.key is not None:
                await place.enter_async_context(self._limits.admit(record.key))
            answer.before_end = place.aclose
            self._lifecycle.in_flight += 1
            try:
                async with asyncio.timeout(self._timeout) as limit:
                    body = await self._read_body(scope, headers, receive)
                    record.received = record.elapsed
                    await _run(self._app, scope, body, receive, answer)
            except TimeoutError:
                if not limit.expired():
                    raise
                text = f"the request took longer than {self._timeout:g} s"
                raise GatewayError(408, text, reason=Reason.TIMEOUT) from None
            finally:
                self._lifecycle.in_flight -= 1

    def _when_to_retry(self) -> dict[str, str]:
        """Headers of an answer with status 503."""
        if self._lifecycle.phase is not Phase.READY:
            return {"retry-after": str(_RETRY_SECONDS)}
        return retries.headers(self._retries.after(time.perf_counter()))

    def _authenticate(self, headers: Headers) -> Key | None:
        if self._keys is None:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = self._keys.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise GatewayError(
                401,
                "a valid API key is needed: Authorization: Bearer <key>",
                reason=Reason.KEY,
            )
        return key

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        if scope["method"] == "POST":
            encoding = headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", ""):
                raise GatewayError(
                    415,
                    f"the body must not be compressed: Content-Encoding is {encoding[:32]!r}",
                    reason=Reason.TYPE,
                    headers={"accept-encoding": "identity"},
                )
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise GatewayError(
                    415, "the body must be JSON: Content-Type: application/json", reason=Reason.TYPE
                )
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > self._max_body_bytes
        body = bytearray()
        more = True
        while more and not too_large:
            chunk, more = await _receive_body(receive)
            too_large = len(body) + len(chunk) > self._max_body_bytes
            body += chunk
        if not too_large:
            return bytes(body)
        del body
        # Clients read the answer only after they have sent everything: let them, for a while.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                while more:
                    _, more = await _receive_body(receive)
        raise GatewayError(
            413, f"the body is larger than {self._max_body_bytes} bytes", reason=Reason.BODY_BYTES
        )


class _ClientGoneError(Exception):
    pass


async def _receive_body(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


class ResponseTracker:
    """`send` that adds the request's id, and remembers how far the answer got.

    A client that has read the end of its answer may send its next request at once. `before_end`
    therefore runs before the end is sent: it frees the place of the API key. Clients stop reading a
    stream at `[DONE]`, or at the event that ends a response of the Responses API.
    """

    def __init__(
        self, send: Send, request_id: str, when_to_retry: Callable[[], dict[str, str]]
    ) -> None:
        self._send = send
        self._request_id = request_id
        self._when_to_retry = when_to_retry
        self.status = 0
        self.complete = False
        self.is_stream = False
        self.before_end: Callable[[], Awaitable[None]] = _nothing

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = self._request_id
            if self.status == 503 and "retry-after" not in headers:
                headers.update(self._when_to_retry())
            self.is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.complete = True
        if self.complete or (self.is_stream and _is_last(bytes(message.get("body", b"")))):
            await self.before_end()
        await self._send(message)


async def _nothing() -> None:
    """Before the end of an answer that holds no place."""


def _is_last(event: bytes) -> bool:
    return event.endswith(_DONE) or event.startswith(_LAST_EVENTS)


async def _run(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, answer: ResponseTracker
) -> None:
    """Run the app until it has answered, or the client has gone.

    It replaces vLLM's `with_cancellation`, which leaves the handler running if it is itself
    cancelled, as the time limit does.
    """
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        # vLLM's handler of text completions answers 400 when it is cancelled.
        if not gone.is_set():
            await answer(message)

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    running = asyncio.ensure_future(app(scope, replay, send))
    listening = asyncio.ensure_future(listen())
    try:
        await asyncio.wait((running, listening), return_when=asyncio.FIRST_COMPLETED)
        # uvicorn sends "http.disconnect" after a complete answer, too.
        if not running.done() and answer.complete:
            await asyncio.wait((running,))
    finally:
        listening.cancel()
        if not running.done():
            gone.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    if gone.is_set():
        raise _ClientGoneError
    running.result()


async def _refuse(
    error: GatewayError, scope: Scope, receive: Receive, answer: ResponseTracker
) -> None:
    if not answer.status:
        await error_response(error)(scope, receive, answer)
    elif answer.is_stream and not answer.complete:
        event = error_event(body_of(error), scope["state"]["record"].next_event)
        await answer({"type": "http.response.body", "body": event.encode()})


def _plain_path(path: str) -> str:
    """The path without a slash at its end, and without empty segments."""
    return "/" + _SLASHES.sub("/", path).strip("/")


def _is_websocket(scope: Scope, headers: Headers) -> bool:
    """Whether it is the handshake of a WebSocket. Clients use HTTP after status 426 or 404 only."""
    return scope["method"] == "GET" and headers.get("upgrade", "").strip().lower() == "websocket"


def _request_id(headers: Mapping[str, Any]) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
