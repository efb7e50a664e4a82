# SPDX-License-Identifier: Apache-2.0
"""One `himap serve` for the tests of this folder, and a host to fetch images from."""

from __future__ import annotations

import functools
import http.server
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.checkpoints import sample_images
from tests.gateway.hostile import CHAT, GOOD
from tests.gateway.support import gateway, metric, post
from tests.servers import Server
from tests.world import World

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


@pytest.fixture(scope="package")
def image_host() -> Iterator[ImageHost]:
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


@pytest.fixture(scope="package")
def server(world: World, image_host: ImageHost) -> Iterator[Server]:
    """Open (no API keys), with tools, pruning by default at (0.5, 0.75)."""
    with gateway(
        world.checkpoint("mha12"),
        *("--image-hosts", image_host.address, "--image-timeout", "2"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ) as server:
        # Live long before the model is loaded; not ready, and requests are refused with a reason.
        server.wait_for("/health/live", 60)
        assert server.status("/health/ready") == 503
        status, headers, body = post(server, "/v1/chat/completions", {})
        assert status == 503
        assert headers["Retry-After"]
        assert body["error"]["message"] == "the model is loading"
        server.wait_for("/health/ready")
        yield server


@pytest.fixture
def goes_on(server: Server) -> Iterator[None]:
    """After the test the server is ready and idle, and answers."""
    yield
    assert server.status("/health/ready") == 200
    status, _, body = post(server, CHAT, GOOD[CHAT])
    assert (status, body["usage"]["completion_tokens"] > 0) == (200, True)
    deadline = time.monotonic() + 30
    while metric(server, "himap_requests_in_flight"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
