# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 as uvicorn speaks it, with limits on what it keeps before the app sees it."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 << 10
MAX_PIPELINED = 16


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol for one connection, with two limits.

    * `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol` (subclassed): uvicorn (0.54) has no
      limit for a request line, headers and trailers, and none for the number of requests that come
      before earlier ones are answered. The app's own limits apply only when the headers are
      complete. Remove when: uvicorn limits both for httptools, as `h11_max_incomplete_event_size`
      does for h11.
    """

    _incomplete = 0
    """Bytes since the parser last called one of the methods below."""

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client; too many of them get 400, and the connection ends."""
        self._incomplete += len(data)
        super().data_received(data)
        if self._incomplete > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """Called by the parser; uvicorn answers 400 to any exception from here."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        self._incomplete = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a piece of the body."""
        self._incomplete = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a request."""
        self._incomplete = 0
        super().on_message_complete()
