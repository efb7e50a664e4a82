# SPDX-License-Identifier: Apache-2.0
"""Requests to upgrade the connection, over raw sockets: each gets one answer, in HTTP/1.1."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from tests.gateway.support import metric
from tests.servers import Server

# The body is a request itself: it must never be answered.
INNER = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
BODY = json.dumps({"model": "tiny", "prompt": INNER.decode(), "max_tokens": 1}).encode()


# Sent when the server has answered, so that it closes: whatever else it had to say comes before.
LAST = b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def talk(server: Server, pieces: Sequence[bytes], pause: float = 0.05) -> list[bytes]:
    """Send pieces in TCP segments of their own; returns all answers, up to that to `LAST`."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        received = connection.recv(1 << 16)
        with suppress(ConnectionError):  # it may have closed
            connection.sendall(LAST)
        with suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                received += data
    answers = [b"HTTP/1.1 " + answer for answer in received.split(b"HTTP/1.1 ")[1:]]
    closed = b"\r\nconnection: close\r\n" in answers[-1]
    assert closed, "the server closed without saying so"
    return answers[:-1] if answers[-1].endswith(b'{"status":"live"}') else answers


def post(
    upgrade: bytes,
    body: bytes = BODY,
    *,
    chunked: bool = False,
    more: bytes = b"",
    connection: bytes = b"Upgrade, HTTP2-Settings",
) -> tuple[bytes, bytes]:
    """Head and body of a text completion that asks for an upgrade."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Connection: %s\r\nUpgrade: %s\r\n%s" % (connection, upgrade, more)
    )
    if chunked:
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        return head + b"Transfer-Encoding: chunked\r\n\r\n", chunks
    return head + b"Content-Length: %d\r\n\r\n" % len(body), body


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0", b"h2c, foo"])
def test_a_post_is_answered_once(server: Server, upgrade: bytes, chunked: bool) -> None:
    head, body = post(upgrade, chunked=chunked)
    for pieces in (
        [head + body],
        [head, body],
        [head[:30], head[30:] + body[:7], body[7:]],
        [head[:-2], head[-2:] + body],
    ):
        (answer,) = talk(server, pieces)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert b'"object":"text_completion"' in answer


@pytest.mark.parametrize("body", [INNER, INNER * 3, b"[" + INNER], ids=["one", "three", "broken"])
def test_a_body_is_never_taken_for_a_request(server: Server, body: bytes) -> None:
    for chunked in (False, True):
        (answer,) = talk(server, post(b"h2c", body, chunked=chunked))
        assert answer.startswith(b"HTTP/1.1 400 "), answer


@pytest.mark.parametrize(
    "connection",
    [
        b"upgrade",
        b"Keep-Alive,\tUPGRADE",
        b"keep-alive\r\nConnection: upgrade",
        b"keep-alive\r\nProxy-Connection: Upgrade",
        b"Upgrade\r\nProxy-Connection: keep-alive, Upgrade",
    ],
)
def test_spellings_of_connection(server: Server, connection: bytes) -> None:
    (answer,) = talk(server, post(b"h2c", connection=connection))
    assert answer.startswith(b"HTTP/1.1 200 "), answer


def test_close_is_kept(server: Server) -> None:
    head, body = post(b"h2c", connection=b"Upgrade, close")
    (answer,) = talk(server, [head + body + INNER])
    assert b"\r\nconnection: close\r\n" in answer


def test_pipelined(server: Server) -> None:
    head, body = post(b"h2c")
    answers = talk(server, [INNER + head + body + head + body + INNER])
    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 200 "] * 4
    assert [b"text_completion" in answer for answer in answers] == [False, True, True, False]


def test_expect_100_continue(server: Server) -> None:
    head, body = post(b"h2c", more=b"Expect: 100-continue\r\n")
    interim, answer = talk(server, [head, body])
    assert interim.startswith(b"HTTP/1.1 100 ")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "start",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["http2", "connect", "connect-path"],
)
def test_other_protocols_end_the_connection(server: Server, start: bytes) -> None:
    for pieces in ([start + INNER], [start, INNER] if start[0] == 0 else [start[:9], start[9:]]):
        (answer,) = talk(server, pieces)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nconnection: close\r\n" in answer


def test_a_websocket_handshake_is_refused_in_the_usual_shape(server: Server) -> None:
    refused = 'himap_refused_requests_total{model_name="tiny",reason="websocket"}'
    before = metric(server, refused)
    handshake = (
        b"GET /v1/responses HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    first, second = talk(server, [handshake, INNER])
    assert first.startswith(b"HTTP/1.1 426 ")
    head, _, body = first.partition(b"\r\n\r\n")
    assert b"\r\nupgrade: HTTP/1.1" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == (None, "invalid_request_error")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert metric(server, refused) == before + 1
