# SPDX-License-Identifier: Apache-2.0
"""Hosts on loopback that images are fetched from, and a resolver that says where hosts are."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from himap_server.errors import GatewayError
from himap_server.security.fetch import FetchLimits, ImageFetcher

from tests.unit.image_files import (
    PARAM,
    encode,
    refused,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PICTURE = encode("PNG")
PUBLIC = "127.0.0.2"  # plays a public address where a test says so; Linux has all of 127/8


class Resolver(AbstractResolver):
    """Answers from a table, one list of addresses for each look-up; the last one stays."""

    def __init__(self, port: int, **answers: Sequence[Sequence[str]]) -> None:
        self.port = port
        self.answers = {name.replace("_", "."): list(lists) for name, lists in answers.items()}
        self.asked: list[str] = []
        self.closed = False

    async def resolve(self, host: str, _port: int = 0, family: Any = 0) -> list[ResolveResult]:
        self.asked.append(host)
        lists = self.answers.get(host.rstrip("."))
        if lists is None:
            raise OSError(socket.EAI_NONAME, "Name or service not known")
        addresses = lists.pop(0) if len(lists) > 1 else lists[0]
        # The test server's port in place of the URL's: nobody may listen on 80 in a test.
        return [
            ResolveResult(hostname=host, host=it, port=self.port, family=family, proto=0, flags=0)
            for it in addresses
        ]

    async def close(self) -> None:
        self.closed = True


class Tap:
    """A listener that counts connections and answers each with the same bytes, or never."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.then: bytes | None = None
        """The answer of every request after the first."""
        self.requests: list[bytes] = []
        self.dialled: list[str] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.dialled.append(writer.get_extra_info("sockname")[0])
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is not None:
                writer.write(self.answer)
                self.answer = self.then or self.answer
                await writer.drain()
            else:
                await asyncio.sleep(60)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def http(body: bytes = PICTURE, status: str = "200 OK", **changes: str) -> bytes:
    """An answer; `Content_Type=""` leaves that header out."""
    headers = {"Content_Type": "image/png", "Content_Length": str(len(body)), **changes}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


@asynccontextmanager
async def tap(answer: bytes | None = None, host: str = "127.0.0.1") -> AsyncIterator[Tap]:
    it = Tap(http() if answer is None else answer or None)
    server = await asyncio.start_server(it.serve, host, 0)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()


@asynccontextmanager
async def site(handler: Handler) -> AsyncIterator[int]:
    """A real web server on loopback; yields its port."""
    app = web.Application()
    app.router.add_get("/{tail:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def get(
    url: str,
    *allowed: str,
    resolver: Resolver | None = None,
    timeout: float = 5,
    max_bytes: int = 100_000,
    **more: Any,
) -> bytes | tuple[int, str]:
    """What was fetched, or the status and reason of the refusal."""
    limits = FetchLimits(max_bytes, timeout, frozenset(allowed), **more)
    fetcher = ImageFetcher(limits, resolver)
    try:
        return await fetcher.fetch(url, PARAM)
    except GatewayError as error:
        return refused(error)
    finally:
        await fetcher.close()


async def get_from(answer: bytes, **options: Any) -> bytes | tuple[int, str]:
    """What becomes of one answer of an allowed host."""
    async with tap(answer) as it:
        return await get(f"http://127.0.0.1:{it.port}/p.png", f"127.0.0.1:{it.port}", **options)
