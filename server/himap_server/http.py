# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 as uvicorn speaks it, with bounds on what it keeps before the app sees it."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 << 10
MAX_PIPELINED = 16


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol for one connection.

    Its parser collects a request line, headers and trailers for as long as they come, from anyone,
    and the app, whose limits are tighter, sees them when they are complete. uvicorn (0.54) has a
    limit for its other parser only, `h11_max_incomplete_event_size`. Requests that are sent before
    earlier ones are answered wait in a queue without bound. Can go when uvicorn has both.
    """

    _incomplete = 0
    """Bytes since the parser last passed something on."""

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; 400 and the end of the connection if they are too many."""
        self._incomplete += len(data)
        super().data_received(data)
        if self._incomplete > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """Called by the parser, which answers 400 to any exception."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        self._incomplete = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser, with what has come of the body."""
        self._incomplete = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._incomplete = 0
        super().on_message_complete()
