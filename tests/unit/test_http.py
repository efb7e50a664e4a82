# SPDX-License-Identifier: Apache-2.0
"""Connections as the server keeps them: slow headers, idle times, and what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
import uvicorn
from himap_server.http import MAX_HEAD_BYTES, BoundedHttp

HEADER_TIMEOUT = 0.4
KEEP_ALIVE = 1
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/unread":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * HEADER_TIMEOUT)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(
        app,
        port=0,
        http=cast("Any", partial(BoundedHttp, header_timeout=HEADER_TIMEOUT)),
        timeout_keep_alive=KEEP_ALIVE,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def talk(port: int, *pieces: bytes | float) -> tuple[bytes, float]:
    """Send pieces, with pauses between them; returns what came until the end, and its time."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        begun = time.monotonic()
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                connection.sendall(piece)
        received = b""
        while data := connection.recv(1 << 16):
            received += data
        return received, time.monotonic() - begun


def assert_error(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].split()[1] == b"%d" % status
    assert {b"content-type: application/json", b"connection: close"} <= set(lines)
    error = json.loads(body)["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\n", GET[:-2], b"\r\n\r\nGET"])
def test_headers_that_come_slowly(port: int, start: bytes) -> None:
    answer, seconds = talk(port, start)
    assert_error(answer, 408)
    assert seconds > HEADER_TIMEOUT - 0.1


def test_bytes_that_trickle_do_not_help(port: int) -> None:
    trickle: list[bytes | float] = [b"X: y\r\n", 0.05] * 60
    with pytest.raises(ConnectionError):  # closed while the client writes
        talk(port, GET[:-2], *trickle, b"\r\n")


def test_a_second_request_that_comes_slowly(port: int) -> None:
    answer, _ = talk(port, GET, 0.3, GET[:20])
    first, _, second = answer.partition(b"\r\n\r\nok")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert_error(second, 408)


def test_an_answer_is_not_interrupted_by_the_next_request(port: int) -> None:
    answer, _ = talk(port, GET.replace(b"/ ", b"/slow ") + GET[:20])
    first, _, second = answer.partition(b"\r\n\r\nok")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert_error(second, 408)


def test_a_body_may_come_slowly(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
    answer, seconds = talk(port, head, 0.3, b"ab", 0.3, b"cd")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert seconds > HEADER_TIMEOUT


@pytest.mark.parametrize("start", [b"", b"\r\n", GET, GET + b"\r\n"])
def test_idle_connections_are_closed(port: int, start: bytes) -> None:
    answer, seconds = talk(port, start)
    assert answer.count(b"HTTP/1.1 200 ") == start.count(b"GET")
    assert seconds > KEEP_ALIVE - 0.1


def test_connections_are_kept_for_that_long(port: int) -> None:
    answer, _ = talk(port, GET, 0.4, GET, 0.4, GET, 0.4, GET)
    assert answer.count(b"HTTP/1.1 200 ") == 4


@pytest.mark.parametrize(
    "start",
    [
        b"\0\r\n\r\n",
        b"GET / HTTP/3.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        GET[:-2] + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
    ids=["binary", "version", "http2", "lengths"],
)
def test_what_is_no_http(port: int, start: bytes) -> None:
    assert_error(talk(port, start)[0], 400)


SLOW = GET.replace(b"/ ", b"/slow ")
POST = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("broken", [b"\0\r\n\r\n", POST + b"no length\r\n"], ids=["head", "body"])
def test_what_is_no_http_waits_for_the_answers_before_it(port: int, broken: bytes) -> None:
    received, _ = talk(port, SLOW + GET, 0.2, broken)
    *answers, last = received.split(b"\r\n\r\nok")
    assert len(answers) == 2
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    assert_error(last, 400)


def test_a_broken_body_is_refused_at_once(port: int) -> None:
    assert_error(talk(port, POST, 0.1, b"no length\r\n")[0], 400)


def test_what_follows_no_http_has_an_end(port: int) -> None:
    endless: list[bytes | float] = [b"x" * MAX_HEAD_BYTES, 0.05] * 8
    with pytest.raises(ConnectionError):  # closed while the client writes
        talk(port, SLOW + b"\0\r\n\r\n", *endless)


def test_an_unread_body_does_not_keep_a_connection(port: int) -> None:
    head = b"POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    trickle: list[bytes | float] = [b"x", 0.2] * (5 * KEEP_ALIVE + 10)
    begun = time.monotonic()
    with pytest.raises(ConnectionError):  # closed while the client writes
        talk(port, head, *trickle)
    assert time.monotonic() - begun > KEEP_ALIVE
