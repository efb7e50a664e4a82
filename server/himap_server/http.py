# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 as uvicorn speaks it, with limits on what it keeps before the app sees it.

Requests to upgrade to another protocol are answered in HTTP/1.1 (RFC 9110, section 7.8: a server
may ignore Upgrade).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .errors import error_body

MAX_HEAD_BYTES = 128 << 10
MAX_PIPELINED = 16

# The parser takes the options of both.
_CONNECTION = frozenset({b"connection", b"proxy-connection"})


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol for one connection, with more limits, and without upgrades.

    A request line with its headers may take `header_timeout` seconds: then 408. A connection is
    closed `timeout_keep_alive` seconds after it was made, or after its last answer, unless a new
    request has begun. What is no HTTP gets 400, after the answers to the requests before it.

    * `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol` (subclassed): uvicorn (0.54) has no
      limit for a request line, headers and trailers, and none for the number of requests that come
      before earlier ones are answered. The app's own limits apply only when the headers are
      complete. Remove when: uvicorn limits both for httptools, as `h11_max_incomplete_event_size`
      does for h11.
    * `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.data_received` (overridden): at a
      request with `Connection: Upgrade`, or `Proxy-Connection: Upgrade`, httptools stops. uvicorn
      drops the body that came so far, and parses the rest as another request. Here a new parser
      gets the head again without that option, and then the body. Remove when: uvicorn reads the
      body of a request whose upgrade it ignores.
    """

    _head_timer: asyncio.TimerHandle | None = None
    """Runs from the first byte of a head to its last."""
    _incomplete = 0
    """Bytes since the parser last called one of the methods below."""
    _without_upgrade = False
    """Whether the parser has the head of a request again, whose upgrade was ignored."""
    _last_words: tuple[int, str] | None = None
    """Status and message that end the connection, when what is being answered is answered."""

    def __init__(self, *args: Any, header_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout = header_timeout

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when a client has connected."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed."""
        self._stop_head_timer()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        """Take bytes from the client; too many of them get 400, and the connection ends."""
        self._incomplete += len(data)
        if self._last_words is not None:  # nothing after it can be understood
            if self._incomplete > MAX_HEAD_BYTES:
                self.transport.close()
            return
        try:
            self._parse(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
            return
        if self._incomplete > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")

    @override
    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, and close the connection."""
        self._stop_head_timer()
        if self._is_answering() and self.cycle.more_body:  # it is the body of this request
            if self.pipeline:
                self.pipeline.popleft()
            elif self.cycle.response_started:
                self.cycle.keep_alive = False
            else:
                self._send_error(400, msg)
                return
        if self._is_answering():
            self._last_words, self._incomplete = (400, msg), 0
        else:
            self._send_error(400, msg)

    @override
    def on_response_complete(self) -> None:
        """Called at the end of an answer."""
        queued = bool(self.pipeline)
        super().on_response_complete()
        if self._last_words is not None and not queued and not self.transport.is_closing():
            self._send_error(*self._last_words)

    @override
    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        if self._head_timer is None:
            self._start_head_timer()

    @override
    def on_headers_complete(self) -> None:
        """Called by the parser; uvicorn answers 400 to any exception from here."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this server is no proxy")
        if self.parser.should_upgrade():
            if self._without_upgrade:
                raise ValueError("an upgrade that cannot be ignored")
            return  # the next parser gets this request again
        self._stop_head_timer()
        self._without_upgrade = False
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        self._incomplete = 0
        self._unset_keepalive_if_required()  # an answer may have ended since the head's first byte
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        """Called by the parser with a piece of the body."""
        self._incomplete = 0
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        """Called by the parser at the end of a request."""
        if self.parser.should_upgrade():
            return
        self._incomplete = 0
        super().on_message_complete()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._header_timeout, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._is_answering():  # the request before this one: wait, and do not write into it
            self._start_head_timer()
        elif not self.transport.is_closing():
            self._send_error(408, f"the headers took longer than {self._header_timeout:g} s")

    def _send_error(self, status: int, message: str) -> None:
        body = json.dumps(error_body(status, message)).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        lines = [b"%s: %s\r\n" % pair for pair in headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        self.transport.close()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                data = self._head_without_upgrade() + data[stop.args[0] :]
                self._without_upgrade = True
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn sets it.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _head_without_upgrade(self) -> bytes:
        """The head of the request that the parser stopped at, without what asks for an upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name in _CONNECTION:
                options = {option.strip().lower() for option in value.split(b",")}
                value = b", ".join(sorted(options & {b"close", b"keep-alive"}))
            if value or name not in _CONNECTION:
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])
