# SPDX-License-Identifier: Apache-2.0
"""Pictures, and a host to fetch them from."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.checkpoints import sample_images

PICTURES = tuple(sample_images(4, seed=3))


@dataclass
class ImageHost:
    """A loopback HTTP server with a PNG at every `/N.png`; `/stall` never answers."""

    address: str
    paths: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://{self.address}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, host: ImageHost, *args: object) -> None:
        self.host = host
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.host.paths.append(self.path)
        if self.path == "/stall":
            self.host.stalled.wait(60)
            return
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("location", "http://127.0.0.1:1/0.png")
            self.end_headers()
            return
        buffer = io.BytesIO()
        PICTURES[int(self.path[1])].save(buffer, "PNG")
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.send_header("content-length", str(buffer.tell()))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_images() -> Iterator[ImageHost]:
    """Run such a host."""
    host = ImageHost("")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, host))
    host.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield host
    host.stalled.set()
    server.shutdown()
    thread.join()
    server.server_close()
