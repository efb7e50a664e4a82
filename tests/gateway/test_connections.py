# SPDX-License-Identifier: Apache-2.0
"""Hostile connections: pipelined, cut off, endless, left in the middle; the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import pytest
from himap_server.http import MAX_HEAD_BYTES

from tests.gateway.hostile import CHAT, GOOD, PICTURE
from tests.gateway.support import metric
from tests.servers import Server

pytestmark = pytest.mark.usefixtures("goes_on")


def _request(body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json",
        f"Content-Length: {len(body)}", *headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def _connection(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 30) as raw:
        yield raw


def _answers(raw: socket.socket, number: int) -> list[tuple[int, Any]]:
    answers = []
    # One buffer for all of them: HTTPResponse would keep what it read beyond its own.
    with raw.makefile("rb") as stream:
        for _ in range(number):
            status = int(stream.readline().split()[1])
            length = 0
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            answers.append((status, json.loads(stream.read(length))))
    return answers


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    good = json.dumps(GOOD[CHAT]).encode()
    with _connection(server) as raw:
        raw.sendall(_request(good) + _request(b"{") + _request(good))
        statuses = [status for status, _ in _answers(raw, 3)]
    assert statuses == [200, 400, 200]


def test_a_connection_closed_halfway(server: Server) -> None:
    """The client sends no more, and may yet listen: it gets its answer, or the request ends."""
    with _connection(server) as raw:
        raw.sendall(_request(json.dumps(GOOD[CHAT]).encode()))
        raw.shutdown(socket.SHUT_WR)
        received = raw.recv(1 << 16)
    assert received.startswith(b"HTTP/1.1 200") or not received


def test_a_body_that_is_never_complete(server: Server) -> None:
    with _connection(server) as raw:
        raw.sendall(_request(b'{"model":')[:-3])
        time.sleep(0.5)
        assert metric(server, "himap_requests_in_flight") == 1
    # `goes_on` waits for the request to end.


def test_a_body_in_small_pieces(server: Server) -> None:
    whole = _request(json.dumps({**GOOD[CHAT], "messages": [PICTURE]}).encode())
    with _connection(server) as raw:
        for start in range(0, len(whole), 500):
            raw.sendall(whole[start : start + 500])
            time.sleep(0.01)
        ((status, _),) = _answers(raw, 1)
    assert status == 200


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        (("X-Request-Id: " + "x" * 10_000,), {200}),
        (("Authorization: Bearer " + "x" * 10_000,), {200}),  # the server is open
        (("Authorization: \xff\xfe",), {200, 400}),
        (("X-Large: " + "x" * 200_000,), {400, 431}),
        (tuple(f"X-{index}: x" for index in range(20_000)), {400, 431}),
        (("Content-Length: 5",), {400}),  # a second one
        (("Transfer-Encoding: chunked",), {400}),  # beside a length: request smuggling
        (("Expect: 100-continue",), {100, 200}),
    ],
    ids=["id", "key", "binary", "large", "many", "two-lengths", "smuggling", "expect"],
)
def test_hostile_headers(server: Server, headers: tuple[str, ...], statuses: set[int]) -> None:
    address = urlsplit(server.url)
    connection = HTTPConnection(str(address.hostname), address.port, timeout=30)
    connection.connect()
    assert connection.sock is not None
    with contextlib.suppress(ConnectionError):  # it may be refused before all of it was sent
        connection.sock.sendall(
            _request(json.dumps(GOOD[CHAT]).encode(), *headers).decode("latin-1").encode("latin-1")
        )
    response = HTTPResponse(connection.sock)
    try:
        response.begin()
        status = response.status
    except ConnectionError:
        status = 400  # closed without a word
    finally:
        connection.close()
    assert status in statuses


@pytest.mark.parametrize("part", ["headers", "a header", "a name", "the path", "trailers"])
def test_what_never_ends_is_cut_off(server: Server, part: str) -> None:
    """From anyone, key or not: the parser keeps all of it."""
    start, endless = {
        "headers": (b"POST /v1/models HTTP/1.1\r\n", b"X: y\r\n"),
        "a header": (b"POST /v1/models HTTP/1.1\r\nX: ", b"y"),
        "a name": (b"POST /v1/models HTTP/1.1\r\n", b"X"),
        "the path": (b"POST /v1/", b"x"),
        "trailers": (
            b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"X: y\r\n",
        ),
    }[part]
    sent = 0
    with _connection(server) as raw:
        raw.sendall(start)
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                sent += raw.send(endless * (65536 // len(endless)))
    # What the parser took, and what lay in the sockets' buffers.
    assert MAX_HEAD_BYTES < sent < 16 << 20


def test_requests_without_end_in_one_connection(server: Server) -> None:
    """Their answers are not waited for: they are queued."""
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = 0
    with _connection(server) as raw, contextlib.suppress(ConnectionError):
        while sent < 64 << 20:
            sent += raw.send(request * 1000)
    assert sent < 16 << 20


def test_streams_that_are_left(server: Server) -> None:
    body = {**GOOD[CHAT], "max_tokens": 400, "ignore_eos": True, "stream": True}
    for _ in range(5):
        with _connection(server) as raw:
            raw.sendall(_request(json.dumps(body).encode()))
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 30
    while metric(server, "vllm:num_requests_running") or metric(server, "vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
