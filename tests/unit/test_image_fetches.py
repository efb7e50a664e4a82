# SPDX-License-Identifier: Apache-2.0
"""How the gateway fetches an image: what it sends, and what it follows.

One test or more for each advisory on images in vLLM and its neighbours, named in the test's id.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from himap_server.errors import GatewayError
from himap_server.security import fetch
from himap_server.security.fetch import (
    USER_AGENT,
    FetchLimits,
    FreshResolver,
    ImageFetcher,
)

from tests.unit.image_files import (
    PARAM,
)
from tests.unit.image_hosts import PICTURE, PUBLIC, Resolver, get, http, site, tap


def test_request_carries_nothing_it_should_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy from the environment, and no cookie, referrer or credential at the second hop."""

    async def scenario() -> None:
        async with tap() as it, tap() as proxy:
            here = f"127.0.0.1:{it.port}"
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
            moved = http(b"", "302 Found", Location="/p.png?a=1#part", Set_Cookie="id=1")
            async with tap(moved.replace(b"/p.png", f"http://{here}/p.png".encode())) as first:
                there = f"127.0.0.1:{first.port}"
                assert await get(f"http://{there}/a%2Fb", here, there) == PICTURE
            assert proxy.connections == 0
        assert first.requests[0].startswith(b"GET /a%2Fb HTTP/1.1\r\n")
        lines = it.requests[0].decode().strip().split("\r\n")
        assert lines.pop(0) == "GET /p.png?a=1 HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        assert headers.pop("Connection", "close") == "close"
        assert headers == {
            "Host": here,
            "Accept": "image/png, image/jpeg, image/webp, image/gif",
            "Accept-Encoding": "identity",
            "User-Agent": USER_AGENT,
        }

    asyncio.run(scenario())


def test_user_agent() -> None:
    """Wikimedia's policy: name, version, contact. An operator gives their own."""
    assert re.fullmatch(r"himap-vllm/\d+\.\d+\.\d+ \(.*\+https://.*\)", USER_AGENT)
    ours = "photos/2.1 (https://x.test/bot; bot@x.test)"

    async def scenario() -> None:
        moved = http(b"", "302 Found", Location="/b")
        async with tap(moved) as it:
            here = f"127.0.0.1:{it.port}"
            await get(f"http://{here}/a", here, user_agent=ours)
            assert len(it.requests) == 4
            for request in it.requests:
                assert f"\r\nUser-Agent: {ours}\r\n".encode() in request

    asyncio.run(scenario())


SIGNED = [
    "/a%2Fb%27c%40d%26e%3Af%7Eg",
    "/b?X-Amz-Credential=AK%2F20250101%2Fs3&X-Amz-Signature=a%3D%3D",
    "/b?Signature=a%2Bb%2f&Key-Pair-Id=K&Policy=ey~_-",
    "/rs:fit:300:300/plain/https%3A%2F%2Fx.test%2Fa%2520b.jpg@webp",
    "/%e4%bd%a0%E5%A5%BD?%zz=%&a=%2",
    "//a//b/;p=1?q='(x)'!*$,+&&==?/:@",
    "/a/%2e%2e/b/%2E",
    '/<>"{}|^`[]?<>"{}|^`[]',
]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        *((target, target) for target in SIGNED),
        ("/a b?c d", "/a%20b?c%20d"),
        ("/\xe9\u4f60?\xe9=\U0001f600", "/%C3%A9%E4%BD%A0?%C3%A9=%F0%9F%98%80"),
        ("/Shot 9.41\u202fAM.png", "/Shot%209.41%E2%80%AFAM.png"),
        ("/a%2Fb#part%2F?x", "/a%2Fb"),
        ("?a=%2F", "/?a=%2F"),
        ("", "/"),
    ],
)
def test_path_and_query_are_sent_as_given(given: str, sent: str) -> None:
    """Signatures are over these bytes. Also those of a redirect's Location, whole or relative."""

    async def scenario() -> None:
        async with tap() as it:
            here = f"127.0.0.1:{it.port}"
            for text in (f"http://{here}{given}", f" \n http://{here}{given} \r\n"):
                assert await get(text, here) == PICTURE
            locations = [f"http://{here}{given}", f"//{here}{given}"]
            if given.startswith("/") and not given.startswith("//") and "2e" not in given:
                locations += [given, given[1:] and f"./{given[1:]}"]
            for location in locations:
                head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
                async with tap(head % location.encode()) as first:
                    first.then = it.answer
                    there = f"127.0.0.1:{first.port}"
                    assert await get(f"http://{there}/x%2Fy", here, there) == PICTURE
                    it.requests += first.requests[1:]
            lines = [request.partition(b"\r\n")[0].decode() for request in it.requests]
            assert lines == [f"GET {sent} HTTP/1.1"] * (2 + len(locations))

    asyncio.run(scenario())


def test_a_relative_location_keeps_the_bytes_of_its_base() -> None:
    async def scenario() -> None:
        async with tap(http(b"", "302 Found", Location="d%40e")) as it:
            it.then = http()
            here = f"127.0.0.1:{it.port}"
            assert await get(f"http://{here}/a%2Fb/c%2Fd?x", here) == PICTURE
            assert it.requests[1].startswith(b"GET /a%2Fb/d%40e HTTP/1.1\r\n")

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(("hops", "outcome"), [(3, PICTURE), (4, (400, "image_fetch"))])
def test_redirects(status: int, hops: int, outcome: object) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        left = int(request.path.rpartition("/")[2])
        if left == 0:
            return web.Response(body=PICTURE, content_type="image/png")
        return web.Response(status=status, headers={"Location": f"./{left - 1}"})

    async def scenario() -> None:
        async with site(handler) as port:
            here = f"127.0.0.1:{port}"
            assert await get(f"http://{here}/hops/{hops}", here) == outcome

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("location", "outcome"),
    [
        pytest.param("http://127.0.0.1/", (400, "image_host"), id="vLLM-57157-loopback"),
        pytest.param("http://169.254.169.254/a", (400, "image_host"), id="vLLM-57157-metadata"),
        pytest.param("//[::1]/", (400, "image_host"), id="vLLM-57157-no-scheme"),
        pytest.param("http://name.test/", (400, "image_host"), id="vLLM-57157-name"),
        pytest.param("http://127.0.0.1:{other}/", (400, "image_url"), id="other-port"),
        pytest.param("file:///etc/passwd", (400, "image_url"), id="file"),
        pytest.param("gopher://127.0.0.1/", (400, "image_url"), id="gopher"),
        pytest.param("http://u:p@127.0.0.1:{port}/", (400, "image_url"), id="userinfo"),
        pytest.param("http://127.0.0.1:{port}\\@x/", (400, "image_url"), id="backslash"),
        pytest.param("http://a\xe9\udc80/", (400, "image_url"), id="not-utf8"),
        pytest.param("", (400, "image_fetch"), id="no-location"),
    ],
)
def test_redirect_is_checked_anew(location: str, outcome: object) -> None:
    """From an allowed host, and with listeners where the redirect leads."""

    async def scenario() -> None:
        async with tap() as other, tap(b"-") as it:
            target = location.format(port=it.port, other=other.port)
            headers = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {target}\r\n\r\n"
            it.answer = headers.encode("utf-8", "surrogateescape")
            if not location:
                it.answer = http(b"", "302 Found")
            resolver = Resolver(other.port, name_test=[["127.0.0.1"]])
            here = f"127.0.0.1:{it.port}"
            assert await get(f"http://{here}/", here, resolver=resolver) == outcome
            assert (it.connections, other.connections) == (1, 0)

    asyncio.run(scenario())


@pytest.mark.usefixtures("public")
def test_redirect_from_public_to_private() -> None:
    """vLLM #57157: the usual way in, from an address that is no exception of the operator's."""

    async def scenario() -> None:
        async with tap() as private:
            target = f"http://127.0.0.1:{private.port}/"
            async with tap(http(b"", "302 Found", Location=target), host=PUBLIC) as it:
                resolver = Resolver(it.port, evil_test=[[PUBLIC]])
                assert await get("http://evil.test/", resolver=resolver) == (400, "image_url")
                it.answer = http(b"", "302 Found", Location="http://127.0.0.1/")
                assert await get("http://evil.test/", resolver=resolver) == (400, "image_host")
                assert (it.connections, private.connections) == (2, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("way", ["silent", "drip", "endless-header", "redirects"])
def test_stalling_server(way: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if way == "redirects":  # each in time, all together not
            await asyncio.sleep(0.15)
            writer.write(http(b"", "302 Found", Location="/"))
        if way == "drip":
            writer.write(http()[: -len(PICTURE)])
        while way in ("drip", "endless-header"):
            writer.write(b"x" if way == "drip" else b"HTTP/1.1 102 Processing\r\n\r\n")
            await asyncio.sleep(0.02)
        if way == "silent":
            await asyncio.sleep(60)
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        here = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        began = asyncio.get_running_loop().time()
        limits = FetchLimits(100_000, 0.3, frozenset({here}))
        fetcher = ImageFetcher(limits)
        with pytest.raises(GatewayError, match=r"longer than 0\.3 s") as caught:
            await fetcher.fetch(f"http://{here}/", PARAM)
        assert (caught.value.status_code, caught.value.reason) == (400, "image_fetch")
        assert 0.25 < asyncio.get_running_loop().time() - began < 1
        await fetcher.close()
        server.close()

    asyncio.run(scenario())


def test_names_that_never_resolve_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than threads that look names up, which nothing can cancel, and than connections."""

    class Silent(asyncio.DatagramProtocol):
        pass

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server, _ = await loop.create_datagram_endpoint(Silent, local_addr=("127.0.0.1", 0))
        port = server.get_extra_info("sockname")[1]
        resolver = FreshResolver(nameservers=["127.0.0.1"], udp_port=port)
        async with tap() as it:
            monkeypatch.setattr(fetch, "_PORTS", frozenset({80, it.port}))
            monkeypatch.setattr(fetch, "_is_public", lambda _: True)
            fetcher = ImageFetcher(FetchLimits(100_000, 1.5, frozenset()), resolver)
            stuck = [
                loop.create_task(fetcher.fetch(f"http://{i}.example/", PARAM)) for i in range(200)
            ]
            await asyncio.sleep(0.1)
            assert await fetcher.fetch(f"http://localhost:{it.port}/", PARAM) == PICTURE
            assert not any(task.done() for task in stuck)
            outcomes = await asyncio.gather(*stuck, return_exceptions=True)
            assert all(isinstance(outcome, GatewayError) for outcome in outcomes)
            await fetcher.close()
        server.close()

    asyncio.run(scenario())


def test_resolvers_are_replaced_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """c-ares keeps every answer it ever got."""
    alive: weakref.WeakSet[aiohttp.AsyncResolver] = weakref.WeakSet()
    make = aiohttp.AsyncResolver

    def made(**options: Any) -> aiohttp.AsyncResolver:
        resolver = make(**options)
        alive.add(resolver)
        return resolver

    monkeypatch.setattr(aiohttp, "AsyncResolver", made)

    async def scenario() -> None:
        resolver = FreshResolver()
        for count in range(1, 200):
            (found, *_) = await resolver.resolve("localhost", 80)
            assert found["host"] == "127.0.0.1"
            assert len(alive) == 1, count
        await resolver.close()
        assert not alive

    asyncio.run(scenario())
