# SPDX-License-Identifier: Apache-2.0
"""The requests of the soak: good, broken off by the client, and hostile."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from PIL import Image

from tests.gateway import hostile
from tests.gateway.hostile import CHAT, RESPONSES, TEXT

MAX_BODY_BYTES = 1 << 20
REQUEST_SECONDS = 120.0
MAX_SURPRISES = 20
OLD_IMAGES = 50  # sent again and again; others are new

GOOD, LEFT, HOSTILE = "good", "left", "hostile"
# What a kind of request may be answered with; 0: nothing, the connection was closed. A server that
# is asked for too much may always say so.
ALLOWED = {
    GOOD: frozenset({200, 503}),
    LEFT: frozenset({0, 200, 503}),
    HOSTILE: frozenset({400, 401, 403, 404, 405, 413, 415, 503}),
}


class Reply(NamedTuple):
    """Status, 0 where the client did not wait for it, and what there is to tell if it is wrong."""

    status: int
    text: str = ""


@dataclass
class Traffic:
    """Makes requests and sends them.

    Attributes:
        outcomes: by kind of request, how often which status came back.
        surprises: the first few that should not have been, as text.
        memory: samples (requests done, seconds, bytes by process).
    """

    session: aiohttp.ClientSession
    url: str
    image_url: str
    random: Random
    outcomes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    surprises: list[str] = field(default_factory=list)
    memory: list[tuple[int, float, dict[str, int]]] = field(default_factory=list)
    done: int = 0

    def kinds(self) -> list[tuple[int, str, str, Callable[[], Awaitable[Reply]]]]:
        """Weight, whether good, name, and how to send one."""
        return [
            (10, GOOD, "chat, text", self._chat_text),
            (14, GOOD, "chat, image", self._chat_image),
            (10, GOOD, "chat, image, stream", self._chat_stream),
            (4, GOOD, "chat, fetched image", self._chat_fetched),
            (4, GOOD, "chat, n=2, logprobs", self._chat_samples),
            (4, GOOD, "chat, structured", self._chat_structured),
            (6, GOOD, "completions", self._completions),
            (6, GOOD, "responses, image", self._responses),
            (6, GOOD, "responses, stream", self._responses_stream),
            (6, LEFT, "stream, left", self._stream_left),
            (4, LEFT, "answer, not awaited", self._answer_left),
            (3, LEFT, "body, not finished", self._body_left),
            (3, HOSTILE, "no or wrong key", self._key),
            (2, HOSTILE, "no route", self._route),
            (2, HOSTILE, "body too large", self._large),
            (6, HOSTILE, "no JSON", self._no_json),
            (6, HOSTILE, "image refused", self._bad_image),
            (10, HOSTILE, "field refused", self._bad_field),
        ]

    async def send_one(self) -> None:
        """One request of a kind chosen by weight."""
        kinds = self.kinds()
        (_, sort, name, send), *_ = self.random.choices(kinds, [kind[0] for kind in kinds])
        try:
            reply = await asyncio.wait_for(send(), REQUEST_SECONDS)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reply = Reply(-1, repr(error))
        self.outcomes[f"{sort}: {name}"][reply.status] += 1
        self.done += 1
        if reply.status not in ALLOWED[sort] and len(self.surprises) < MAX_SURPRISES:
            self.surprises.append(f"{name}: {reply.status} {reply.text}")

    # How requests are sent

    async def _post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self.session.post(self.url + path, data=data, headers=headers) as answer:
            text = await answer.text()
            # An error inside of a stream has no status of its own.
            failed = answer.status == 200 and '"error":{' in text
            return Reply(500 if failed else answer.status, f"{text[-300:]} for {data[-300:]!r}")

    async def _leave(self, path: str, body: Any, chunks: int) -> Reply:
        async with self.session.post(self.url + path, json=body) as answer:
            for _ in range(chunks):
                await answer.content.readany()
            answer.close()
            return Reply(answer.status)

    # Good

    def _picture(self) -> str:
        # Old ones are in the caches, new ones push others out.
        old = self.random.random() < 0.5
        noise = Random(self.random.randrange(OLD_IMAGES) if old else self.random.random())
        buffer = io.BytesIO()
        Image.frombytes("RGB", (32, 32), noise.randbytes(3 * 32 * 32)).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _message(self, url: str) -> dict[str, Any]:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What?"},
        ]
        return {"role": "user", "content": parts}

    def _chat(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": "tiny",
            "messages": [self._message(self._picture())],
            "max_tokens": self.random.randrange(1, 32),
            "himap": {"shallow_ratio": self.random.choice((0, 0.25, 0.5))},
            "user": secrets.token_hex(4),
            **fields,
        }

    async def _chat_text(self) -> Reply:
        words = " ".join(str(self.random.random()) for _ in range(self.random.randrange(1, 10)))
        return await self._post(CHAT, self._chat(messages=[{"role": "user", "content": words}]))

    async def _chat_image(self) -> Reply:
        return await self._post(CHAT, self._chat(), **{"X-Request-Id": secrets.token_hex(16)})

    async def _chat_stream(self) -> Reply:
        options = {"include_usage": True}
        return await self._post(CHAT, self._chat(stream=True, stream_options=options))

    async def _chat_fetched(self) -> Reply:
        url = f"{self.image_url}/{self.random.randrange(10**6)}.png"
        return await self._post(CHAT, self._chat(messages=[self._message(url)]))

    async def _chat_samples(self) -> Reply:
        body = self._chat(n=2, temperature=1, logprobs=True, top_logprobs=3)
        return await self._post(CHAT, body)

    async def _chat_structured(self) -> Reply:
        choices = [secrets.token_hex(4), "no"]  # every grammar is compiled and kept: a new one
        return await self._post(CHAT, self._chat(structured_outputs={"choice": choices}))

    async def _completions(self) -> Reply:
        prompts = [str(self.random.random()) for _ in range(self.random.randrange(1, 4))]
        return await self._post(TEXT, {"model": "tiny", "prompt": prompts, "max_tokens": 8})

    def _response(self, **fields: Any) -> dict[str, Any]:
        content = [
            {"type": "input_image", "image_url": self._picture(), "detail": "auto"},
            {"type": "input_text", "text": "What?"},
        ]
        return {
            "model": "tiny",
            "input": [{"role": "user", "content": content}],
            "max_output_tokens": 8,
            **fields,
        }

    async def _responses(self) -> Reply:
        return await self._post(RESPONSES, self._response())

    async def _responses_stream(self) -> Reply:
        return await self._post(RESPONSES, self._response(stream=True))

    # Left

    async def _stream_left(self) -> Reply:
        body = self._chat(stream=True, max_tokens=400, ignore_eos=True)
        path = CHAT
        if self.random.random() < 0.3:
            body, path = (
                self._response(stream=True, max_output_tokens=400, ignore_eos=True),
                RESPONSES,
            )
        return await self._leave(path, body, self.random.randrange(1, 5))

    async def _answer_left(self) -> Reply:
        body = self._chat(max_tokens=400, ignore_eos=True)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._post(CHAT, body), self.random.random() / 2)
        return Reply(0)

    async def _body_left(self) -> Reply:
        address = urlsplit(self.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        key = self.session.headers["Authorization"]
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: {key}\r\nContent-Length: 99999\r\n\r\n"
        )
        writer.write(head.encode() + b"[" * self.random.randrange(9999))
        await writer.drain()
        await asyncio.sleep(self.random.random() / 4)
        writer.close()
        return Reply(0)

    # Hostile

    async def _key(self) -> Reply:
        key = self.random.choice(("", "Bearer", "Basic eDp4", f"Bearer {secrets.token_hex(32)}"))
        return await self._post(CHAT, self._chat(), Authorization=key)

    async def _route(self) -> Reply:
        path = self.random.choice(
            ("/v1/x", f"/v1/{secrets.token_hex(8)}", "/tokenize", "/v1/files")
        )
        return await self._post(path, self._chat())

    async def _large(self) -> Reply:
        return await self._post(CHAT, b'{"model":"tiny","x":"' + b"x" * MAX_BODY_BYTES + b'"}')

    async def _no_json(self) -> Reply:
        body = self.random.choice([*hostile.BODIES.values(), self.random.randbytes(1000)])
        kind = self.random.choice(("application/json", self.random.choice(hostile.CONTENT_TYPES)))
        return await self._post(CHAT, body, **{"Content-Type": kind})

    async def _bad_image(self) -> Reply:
        url = self._picture()
        torn = url[: len(url) // 2 // 4 * 4]
        gone = (torn, f"{self.image_url}/missing", f"{self.image_url}/redirect")
        bad = self.random.choice((*hostile.IMAGE_URLS, *gone))
        return await self._post(CHAT, self._chat(messages=[self._message(bad)]))

    async def _bad_field(self) -> Reply:
        path, fields = self.random.choice(hostile.FIELDS)
        body = json.dumps({**hostile.GOOD[path], **fields})
        return await self._post(path, body.replace(hostile.WORD, secrets.token_hex(4)).encode())


@contextlib.asynccontextmanager
async def image_host() -> AsyncIterator[str]:
    """Serves a picture, different for every path, on loopback."""

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.path == "/redirect":
            raise web.HTTPFound("http://127.0.0.1:1/x.png")
        if request.path == "/missing":
            raise web.HTTPNotFound
        buffer = io.BytesIO()
        noise = Random(request.path).randbytes(3 * 32 * 32)
        Image.frombytes("RGB", (32, 32), noise).save(buffer, "PNG")
        return web.Response(body=buffer.getvalue(), content_type="image/png")

    app = web.Application()
    app.router.add_get("/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
