# SPDX-License-Identifier: Apache-2.0
"""What clients, proxies and probes expect of HTTP: paths, methods, headers."""

from __future__ import annotations

import gzip
import json
from http.client import HTTPConnection, HTTPMessage
from urllib.parse import urlsplit

import openai
import pytest
import vllm

import himap_vllm
from tests.gateway.hostile import CHAT, GOOD, RESPONSES, TEXT
from tests.gateway.support import client, post
from tests.servers import Server


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, HTTPMessage, bytes]:
    """Status, headers and body. The path is sent as it is."""
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def test_one_model(server: Server) -> None:
    assert client(server).models.retrieve("tiny").id == "tiny"
    listed = json.loads(ask(server, "GET", "/v1/models")[2])["data"][0]
    card = json.loads(ask(server, "GET", "/v1/models/tiny/")[2])
    assert (card["root"], card["max_model_len"]) == (listed["root"], 512)
    for name in ("gone", "a/b", "tiny/tiny", "x" * 1000):
        with pytest.raises(openai.NotFoundError) as error:
            client(server).models.retrieve(name)
        assert error.value.param == "model"
        assert f"`{name[:256]}`" in error.value.message


def test_version_and_health(server: Server) -> None:
    version = json.loads(ask(server, "GET", "/version")[2])
    assert version == {"version": himap_vllm.__version__, "vllm": vllm.__version__}
    for path in ("/health", "/health/ready"):
        status, _, body = ask(server, "GET", path)
        assert (status, json.loads(body)) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/v1/models", "/v1/models/tiny", "/version", "/docs"]
)
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    status, headers, body = ask(server, "HEAD", path)
    assert (status, body) == (200, b"")
    got = ask(server, "GET", path)
    for name in ("content-type", "content-length"):
        assert headers[name] == got[1][name]


def test_head_elsewhere(server: Server) -> None:
    assert ask(server, "HEAD", "/metrics")[0] == 200
    assert ask(server, "HEAD", "/v1/models/gone")[0] == 404
    status, headers, _ = ask(server, "HEAD", CHAT)
    assert (status, headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models//", "/health/", "//health//ready/"]
)
def test_slashes_too_many(server: Server, path: str) -> None:
    status, _, body = ask(server, "GET", path)
    assert (status, b"tiny" in body or b"ready" in body) == (200, True)


def test_slashes_of_posts(server: Server) -> None:
    for path, good in GOOD.items():
        assert post(server, f"/{path}/", good)[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate, gzip", "GZIP"])
def test_compressed_bodies(server: Server, encoding: str) -> None:
    body = gzip.compress(json.dumps(GOOD[TEXT]).encode())
    status, headers, answer = post(server, TEXT, body, **{"content-encoding": encoding})
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert encoding.lower() in answer["error"]["message"]


def test_a_body_that_says_it_is_not_compressed(server: Server) -> None:
    assert post(server, TEXT, GOOD[TEXT], **{"content-encoding": "identity"})[0] == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_proxies_may_not_hold_streams_back(server: Server, path: str) -> None:
    body = json.dumps({**GOOD[path], "stream": True}).encode()
    status, headers, _ = ask(server, "POST", path, body, content_type="application/json")
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
