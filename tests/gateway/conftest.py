# SPDX-License-Identifier: Apache-2.0
"""One `himap serve` for the tests of this folder, and what all its clients are asked."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.gateway.clients import (
    DATA_URL,
    GREEDY,
    HIMAP,
    KEPT_DEEP,
    NUM_TOKENS,
    Expected,
    chat_messages,
    responses_input,
    savings,
)
from tests.gateway.hostile import CHAT, GOOD
from tests.gateway.images import ImageHost, serving_images
from tests.gateway.support import gateway, metric, post
from tests.servers import Server
from tests.world import World

ORIGIN = "https://app.example"


@pytest.fixture(scope="package")
def image_host() -> Iterator[ImageHost]:
    with serving_images() as host:
        yield host


@pytest.fixture(scope="package")
def server(world: World, image_host: ImageHost) -> Iterator[Server]:
    """Open (no API keys), with tools, pruning by default at (0.5, 0.75)."""
    with gateway(
        world.checkpoint("mha12"),
        *("--image-hosts", image_host.address, "--image-timeout", "2"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--root-path", "/proxy", "--allowed-origins", f'["{ORIGIN}"]'),
        *("--header-timeout", "4"),
    ) as server:
        # Live long before the model is loaded; not ready, and requests are refused with a reason.
        server.wait_for("/health/live", 180)
        assert server.status("/health/ready") == 503
        status, headers, body = post(server, "/v1/chat/completions", {})
        assert status == 503
        assert headers["Retry-After"]
        assert body["error"]["message"] == "the model is loading"
        server.wait_for("/health/ready")
        yield server


@pytest.fixture
def goes_on(server: Server) -> Iterator[None]:
    """Afterwards the server is ready and idle, and answers."""
    yield
    assert server.status("/health/ready") == 200
    status, _, body = post(server, CHAT, GOOD[CHAT])
    assert (status, body["usage"]["completion_tokens"] > 0) == (200, True)
    deadline = time.monotonic() + 30
    while metric(server, "himap_requests_in_flight"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="package")
def expected(server: Server) -> Expected:
    """What a raw request is answered."""
    body = {**GREEDY, "messages": chat_messages(DATA_URL), "himap": HIMAP}
    status, _, chat = post(server, "/v1/chat/completions", body)
    assert status == 200
    assert chat["usage"]["himap"]["kept_deep"] == KEPT_DEEP
    text: str = chat["choices"][0]["message"]["content"]
    assert len(text) == NUM_TOKENS
    body = {
        "model": "tiny", "max_output_tokens": NUM_TOKENS, "temperature": 0, "himap": HIMAP,
        "input": responses_input(DATA_URL),
    }  # fmt: skip
    status, _, response = post(server, "/v1/responses", body)
    assert status == 200
    responses_text = response["output"][0]["content"][0]["text"]
    usage = chat["usage"] | {"himap": savings(chat["usage"]["himap"])}
    return Expected(text, responses_text, usage)


@pytest.fixture(params=["data", "http"])
def url(request: pytest.FixtureRequest, image_host: ImageHost) -> str:
    """The same picture both ways."""
    return DATA_URL if request.param == "data" else image_host.url("0.png")
