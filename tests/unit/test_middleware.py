# SPDX-License-Identifier: Apache-2.0
"""The request middleware around apps that misbehave: answers to the client, and the record."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from himap_server.lifecycle import Lifecycle, Phase
from himap_server.middleware import RequestMiddleware
from himap_server.record import RequestRecord
from himap_server.security.keys import KeyRing, make_key
from starlette._utils import get_route_path

App = Callable[[Any, Any, Any], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": []}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream")]}


class Client:
    """Sends one request through a middleware around `app`."""

    def __init__(
        self, app: App, timeout: float = 5.0, body: bytes = b"{}", root_path: str = ""
    ) -> None:
        self.sent: list[Any] = []
        self.records: list[RequestRecord] = []
        self.reads = True
        self.gone = asyncio.Event()
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        self.lifecycle = Lifecycle(1.0)
        self.lifecycle.phase = Phase.READY
        self.middleware = RequestMiddleware(
            app,
            self.lifecycle,
            keys=None,
            max_body_bytes=100,
            request_timeout=timeout,
            root_path=root_path,
            report=self.records.append,
        )

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def ask(self, *headers: tuple[bytes, bytes]) -> RequestRecord:
        """Run the request to its end; nothing may be left of it."""
        scope = {
            "type": "http", "method": "POST", "path": "/v1/x",
            "headers": [(b"content-type", b"application/json"), *headers],
        }  # fmt: skip
        await self.middleware(scope, self.receive, self.send)
        assert self.lifecycle.in_flight == 0
        await asyncio.sleep(0)  # a cancelled task ends with the loop's next turn
        assert len(asyncio.all_tasks()) == 1
        (record,) = self.records
        return record

    async def seen_path(self, path: str) -> tuple[str, bool]:
        """The path that the router sees, and whether the request is one to `/v1`."""
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        await self.middleware(scope, self.receive, self.send)
        return self.sent[-1]["body"].decode(), bool(self.records)

    @property
    def error(self) -> Any:
        """The error in the answer's last body."""
        text = self.sent[-1]["body"].decode().rpartition("data: ")[2]
        return json.loads(text)["error"]


async def stuck(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    await asyncio.Event().wait()


async def stuck_stream(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    await send(EVENTS)
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    await asyncio.Event().wait()


async def answers_its_cancellation(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await send({**START, "status": 400})
        await send({"type": "http.response.body", "body": b"late"})


async def fails_when_cancelled(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    try:
        await asyncio.Event().wait()
    finally:
        raise RuntimeError


async def fails_in_mid_answer(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    await send(EVENTS)
    raise RuntimeError


async def responses_stream(scope: Any, receive: Any, send: Any) -> None:
    scope["state"]["record"].next_event = 7
    await stuck_stream(scope, receive, send)


async def tells_its_path(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    assert scope["method"] == "GET"
    await send(START)
    await send({"type": "http.response.body", "body": get_route_path(scope).encode()})


async def is_busy(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    await send({**START, "status": 503})
    await send({"type": "http.response.body", "body": b"full"})


async def answers(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["body"] == b"{}"
    assert dict(scope["headers"]) == {b"content-type": b"application/json"}
    await send(START)
    await send({"type": "http.response.body", "body": b"ok"})


def test_an_answer() -> None:
    async def run() -> None:
        client = Client(answers)
        record = await client.ask()
        assert (record.status, record.reason) == (200, None)
        assert client.sent[-1]["body"] == b"ok"

    asyncio.run(run())


@pytest.mark.parametrize(
    "app", [stuck, stuck_stream, answers_its_cancellation, fails_when_cancelled]
)
def test_the_time_limit(app: App) -> None:
    async def run() -> None:
        client = Client(app, timeout=0.1)
        record = await client.ask()
        assert client.error["type"] == "invalid_request_error"
        assert record.reason == "timeout"
        assert record.status == 408
        (start,) = (message for message in client.sent if message["type"] == "http.response.start")
        assert start["status"] == (200 if app is stuck_stream else 408)

    asyncio.run(run())


@pytest.mark.parametrize(
    "app", [stuck, stuck_stream, answers_its_cancellation, fails_when_cancelled]
)
def test_a_client_that_goes_away(app: App) -> None:
    async def run() -> None:
        client = Client(app)
        asyncio.get_running_loop().call_later(0.1, client.gone.set)
        record = await client.ask()
        assert record.status == 499
        assert len(client.sent) == (2 if app is stuck_stream else 0)

    asyncio.run(run())


def test_the_time_limit_of_a_responses_stream() -> None:
    async def run() -> None:
        client = Client(responses_stream, timeout=0.1)
        assert (await client.ask()).status == 408
        text = client.sent[-1]["body"].decode()
        assert text.startswith("event: error\ndata: ")
        event = json.loads(text.partition("data: ")[2])
        assert (event["type"], event["sequence_number"], event["code"]) == ("error", 7, None)
        assert event["message"] == event["error"]["message"]

    asyncio.run(run())


@pytest.mark.parametrize("encoding", [b"gzip", b"zstd", b"deflate, BR"])
def test_a_compressed_body(encoding: bytes) -> None:
    async def run() -> None:
        client = Client(answers)
        record = await client.ask((b"content-encoding", encoding))
        assert (record.status, record.reason) == (415, "type")
        assert encoding.decode().lower() in client.error["message"]
        assert (b"accept-encoding", b"identity") in client.sent[0]["headers"]

    asyncio.run(run())


def test_a_full_queue_spreads_its_clients() -> None:
    async def run() -> list[bytes]:
        found = []
        client = Client(is_busy)
        for _ in range(3):
            client._messages = [{"type": "http.request", "body": b"{}", "more_body": False}]
            client.records.clear()
            await client.ask()
            headers = dict(client.sent[-2]["headers"])
            assert int(headers[b"retry-after"]) >= 1
            found.append(headers[b"retry-after-ms"])
        return found

    times = [int(value) for value in asyncio.run(run())]
    assert 400 < times[0] <= 500 < times[1] <= 1000 < times[2] <= 1500


@pytest.mark.parametrize(
    ("root", "path", "seen", "counted"),
    [
        ("", "/v1/x", "/v1/x", True),
        ("", "//v1//x/", "/v1/x", True),
        ("", "/health/", "/health", False),
        ("", "/", "/", False),
        ("", "///", "/", False),
        ("/a/b", "/v1/x", "/v1/x", True),
        ("/a/b", "/a/b/v1/x", "/v1/x", True),
        ("a/b/", "//a//b//v1/x", "/v1/x", True),
        ("/a", "/a", "/", False),
        ("/a", "/ab/v1/x", "/ab/v1/x", False),
        ("/a", "/a/a/v1/x", "/a/v1/x", False),  # else it would pass by the keys
        ("/a", "/b/a/v1/x", "/b/a/v1/x", False),
    ],
)
def test_the_router_sees_the_path_that_was_checked(
    root: str, path: str, seen: str, counted: bool
) -> None:
    client = Client(tells_its_path, root_path=root)
    assert asyncio.run(client.seen_path(path)) == (seen, counted)


def test_a_client_that_stops_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("himap_server.middleware._LAST_WORDS_SECONDS", 0.1)

    async def run() -> None:
        client = Client(stuck, timeout=0.1)
        client.reads = False
        assert (await client.ask()).reason == "timeout"

    asyncio.run(run())


def test_a_body_that_is_declared_too_large_and_never_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("himap_server.middleware._LAST_WORDS_SECONDS", 0.1)

    async def run() -> None:
        client = Client(answers, body=b"x" * 101)
        client._messages[0]["more_body"] = True
        assert (await client.ask()).status == 413

    asyncio.run(run())


def test_an_app_that_fails_is_not_a_client_that_goes_away() -> None:
    async def run() -> None:
        client = Client(fails_in_mid_answer)
        with pytest.raises(RuntimeError):
            await client.ask()
        assert client.records[0].status == 500

    asyncio.run(run())


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (START, b"ok"),
        (EVENTS, b"data: [DONE]\n\n"),
        (EVENTS, b"event: response.completed\ndata: {}\n\n"),
        (EVENTS, b"event: response.incomplete\ndata: {}\n\n"),
    ],
)
def test_a_keys_place_is_free_when_its_answer_ends(tmp_path: Path, start: Any, end: bytes) -> None:
    """A client that asks again at every message is refused until the last, and not then."""
    token, entry = make_key("single")
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{entry}    max_concurrent: 1\n")

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        await send(start)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": end, "more_body": start is EVENTS})
        if start is EVENTS:
            await send({"type": "http.response.body", "body": b""})

    lifecycle = Lifecycle(1.0)
    lifecycle.phase = Phase.READY
    middleware = RequestMiddleware(
        app, lifecycle,
        keys=KeyRing(file), max_body_bytes=100, request_timeout=5.0, report=lambda _: None,
    )  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": "/v1/x",
        "headers": [
            (b"content-type", b"application/json"), (b"authorization", f"Bearer {token}".encode()),
        ],
    }  # fmt: skip
    again: list[tuple[bytes, int]] = []

    async def ask(deeper: bool) -> int:
        unread = [{"type": "http.request", "body": b"{}"}]
        status = 0

        async def receive() -> Any:
            return unread.pop() if unread else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal status
            status = status or message["status"]
            if deeper:
                again.append((message.get("body", b""), await ask(False)))

        await middleware(scope, receive, send)
        return status

    assert asyncio.run(ask(True)) == 200
    assert again[:3] == [(b"", 429), (b"data: 1\n\n", 429), (end, 200)]
