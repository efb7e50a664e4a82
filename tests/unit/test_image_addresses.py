# SPDX-License-Identifier: Apache-2.0
"""Which hosts the gateway asks for an image, and at which addresses.

One test or more for each advisory on images in vLLM and its neighbours, named in the test's id.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from himap_server.errors import GatewayError
from himap_server.security import fetch
from himap_server.security.fetch import FetchLimits, ImageFetcher

from tests.unit.image_files import (
    PARAM,
    refused,
)
from tests.unit.image_hosts import PICTURE, PUBLIC, Resolver, Tap, get, tap

PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "168.63.129.16", "192.88.99.1"),
    *("::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1"),
    *("2001:db8::1", "3fff::1", "5f00::1", "100::1", "4000::1", "fe80::1%1", "2606:4700::1%1"),
    # IPv4 inside IPv6: mapped, compatible, 6to4, Teredo, NAT64
    *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "::8.8.8.8", "2002:7f00:1::"),
    *("2002:a9fe:a9fe::1", "2001:0:808:808::f7f7:f7f7", "2001::f7f7:f7f7"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "64:ff9b:1:a9fe:a9:fe00::"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    """GHSA-3f6c-7fw2-ppm4, by literal and by name."""
    assert not fetch._is_public(address)
    opened: list[Any] = []

    async def scenario() -> None:
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert await get(url.replace("%", "%25")) == (400, "image_host")
        resolver = Resolver(80, name_test=[[address]])
        assert await get("https://name.test/", resolver=resolver) == (400, "image_host")
        assert resolver.asked == ["name.test"]
        assert resolver.closed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "socket", SimpleNamespace(socket=lambda *args: opened.append(args)))
        asyncio.run(scenario())
    assert opened == []


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "1.1.1.1", "192.0.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111"),
        *("::ffff:8.8.8.8", "2002:808:808::1", "64:ff9b::8.8.8.8"),
    ],
)
def test_public_addresses(address: str) -> None:
    assert fetch._is_public(address)


@pytest.mark.parametrize("host", ["a..test", "a" * 64 + ".test"])
def test_names_that_dns_cannot_express(host: str) -> None:
    """The system's resolver raises a UnicodeError."""
    assert asyncio.run(get(f"http://{host}/")) == (400, "image_fetch")


@pytest.mark.parametrize("text", ["localhost", "127.1", "0x7f.1", "2130706433", "010.0.0.1", ""])
def test_what_is_no_address_is_not_public(text: str) -> None:
    assert not fetch._is_public(text)


SPELLINGS = [
    "127.0.0.1",
    "2130706433",
    "0x7f.1",
    "0x7f000001",
    "127.1",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
]
SPELLINGS += ["localhost", "localhost.", "LOCALHOST", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]
SPELLINGS += ["127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1", "\u24dbocalhost"]


@pytest.mark.parametrize("host", SPELLINGS)
def test_loopback_spellings_reach_nothing(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GHSA-3f6c-7fw2-ppm4: to a listener that is there, by the system's own resolver."""

    async def scenario() -> None:
        async with tap() as it:
            monkeypatch.setattr(fetch, "_PORTS", frozenset({it.port}))
            outcome = await get(f"http://{host}:{it.port}/")
            assert outcome in ((400, "image_host"), (400, "image_fetch"))
            assert it.connections == 0
            if host in ("127.0.0.1", "localhost"):  # the listener does listen
                monkeypatch.setattr(fetch, "_is_public", lambda _: True)
                assert await get(f"http://{host}:{it.port}/") == PICTURE
                assert it.connections == 1

    asyncio.run(scenario())


@pytest.mark.usefixtures("public")
def test_rebinding() -> None:
    """vLLM #57157: public for the check, private for the connection."""

    async def scenario() -> None:
        async with tap(host=PUBLIC) as good:
            resolver = Resolver(good.port, re_test=[[PUBLIC], ["127.0.0.1"]])
            assert await get("http://re.test/", resolver=resolver) == PICTURE
            assert resolver.asked == ["re.test"]  # there was no second question
            assert await get("http://re.test/", resolver=resolver) == (400, "image_host")
            assert good.connections == 1
            assert b"Host: re.test\r\n" in good.requests[0]

    asyncio.run(scenario())


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    "form",
    [
        "http://{host}/a%2Fb?c=%27",
        " HTTP://{host}:{port}/ \n",
        "http://{host}:{port}?a#@127.0.0.1/",
        "http://{host}/http://127.0.0.1/",
        "http://{host}/@127.0.0.1/",
        "http://{host}?@127.0.0.1/",
        "http://{host}#@127.0.0.1/",
        "http://{host}/%0d%0aHost:%20127.0.0.1",
        "http://{host}:{port}/\u202f\u2028é ",
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("host", [PUBLIC, "name.test", "NAME.test.", "nämé.test"])
def test_the_address_checked_is_the_address_connected_to(
    form: str, host: str, redirected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a URL is written, the peer is one that was asked about just before."""
    checked: list[str] = []
    is_public = fetch._is_public

    def remember(address: str) -> bool:
        checked.append(address)
        return is_public(address)

    async def scenario() -> None:
        async with tap(host=PUBLIC) as it:
            monkeypatch.setattr(fetch, "_is_public", remember)
            monkeypatch.setattr(fetch, "_PORTS", frozenset({80, it.port}))
            url = form.format(host=host, port=it.port)
            if host == PUBLIC and f":{it.port}" not in url:
                url = url.replace(PUBLIC, f"{PUBLIC}:{it.port}", 1)
            answers = {"name_test": [[PUBLIC]], "xn--nm-viav_test": [[PUBLIC]]}
            resolver = Resolver(it.port, **answers)
            if not redirected:
                assert await get(url, resolver=resolver) == PICTURE
            else:
                moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
                async with tap(moved % url.strip().encode()) as first:
                    here = f"127.0.0.1:{first.port}"
                    assert await get(f"http://{here}/", here, resolver=resolver) == PICTURE
            assert it.dialled == checked == [PUBLIC]

    asyncio.run(scenario())


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("order", [[PUBLIC, "127.0.0.1"], ["127.0.0.1", PUBLIC]])
def test_of_mixed_addresses_only_the_public_one_is_dialled(order: list[str]) -> None:
    async def scenario() -> None:
        async with tap(host=PUBLIC) as good:
            bad = Tap(None)
            server = await asyncio.start_server(bad.serve, "127.0.0.1", good.port)
            resolver = Resolver(good.port, mixed_test=[order])
            assert await get("http://mixed.test/", resolver=resolver) == PICTURE
            server.close()
            assert (good.connections, bad.connections) == (1, 0)

    asyncio.run(scenario())


def test_a_name_with_thousands_of_addresses() -> None:
    async def scenario() -> None:
        addresses = [f"10.0.{i >> 8}.{i & 255}" for i in range(4000)]
        resolver = Resolver(80, many_test=[addresses])
        assert await get("http://many.test/", resolver=resolver, timeout=1) == (400, "image_host")

    asyncio.run(scenario())


def test_forbidden_and_unreachable_read_the_same() -> None:
    """vLLM #57157, TRT-LLM #13680: no map of the internal network, no resolved address."""

    async def scenario() -> None:
        texts = []
        resolver = Resolver(80, private_test=[["10.1.2.3"]])
        fetcher = ImageFetcher(FetchLimits(1000, 5, frozenset({"127.0.0.1:9"})), resolver)
        for host in ("private.test", "unknown.test", "10.1.2.3", "a..test", "127.0.0.1:9"):
            with pytest.raises(GatewayError) as caught:
                await fetcher.fetch(f"http://{host}/?token=secret", PARAM)
            refused(caught.value)
            texts.append(caught.value.detail)
        await fetcher.close()
        assert len(set(texts)) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(r"http://good.test\@127.0.0.1/", id="CVE-2026-24779-userinfo"),
        pytest.param(r"http://good.test\.evil.test/", id="CVE-2026-24779-host"),
        pytest.param(r"http:\\good.test/", id="CVE-2026-24779-slashes"),
        pytest.param("http://good.test/a\\b", id="CVE-2026-24779-path"),
        "http://user@good.test/",
        "http://user:secret@good.test/",
        "http://:secret@good.test/",
        "http://good.test@127.0.0.1/",
        "http://good.test:80@127.0.0.1/",
        "http://good.test/\r\nX-Injected: 1",
        "http://good.test/\ta",
        "http://good.test\0.evil.test/",
        "http://good.test /",
        "http:// good.test/",
        "http://good\u2028.test/",
        "http://good.test/\udc80",
        "http://good\u200b.test/",
        "http://good.test\u3000/",
        "http:///p.png",
        "http:p.png",
        "//good.test/p.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://good.test/etc/passwd",
        "gopher://good.test/",
        "ftp://good.test/",
        "ws://good.test/",
        "unix:///run/docker.sock",
        "tcp://good.test:80",
        "blob:http://good.test/",
        "data:image/png;base64,AAAA",
        "http://[::1",
        "http://good.test:99999/",
        "http://good.test:x/",
        "http://good.test/" + "a" * 9000,
        "",
    ],
)
def test_malformed_urls(url: str) -> None:
    resolver = Resolver(80, good_test=[["127.0.0.1"]])
    assert asyncio.run(get(url, resolver=resolver)) == (400, "image_url")
    assert resolver.asked == []


@pytest.mark.parametrize("port", [0, 22, 81, 6379, 8000, 8080, 65535])
def test_ports(port: int) -> None:
    resolver = Resolver(80)
    assert asyncio.run(get(f"http://x.test:{port}/", resolver=resolver)) == (400, "image_url")
    # Allowing a host's port doesn't allow its others, nor that port of another host.
    allowed = ("x.test:8001", f"y.test:{port}")
    outcome = asyncio.run(get(f"http://x.test:{port}/", *allowed, resolver=resolver))
    assert outcome == (400, "image_url")
    assert resolver.asked == []
    outcome = asyncio.run(get(f"http://x.test:{port}/", f"x.test:{port}", resolver=resolver))
    assert outcome == (400, "image_fetch")
    assert resolver.asked


@pytest.mark.parametrize("allowed", ["Box.Test", "box.test", "box.test.", "box.test:{port}"])
def test_allowed_host(allowed: str) -> None:
    async def scenario() -> None:
        async with tap() as it:
            entry = allowed.format(port=it.port)
            resolver = Resolver(it.port, box_test=[["127.0.0.1"]])
            for host in ("box.test", "BOX.test", "box.test."):
                assert await get(f"http://{host}:{it.port}/", entry, resolver=resolver) == PICTURE
            # The name is allowed, not its address.
            assert await get("http://127.0.0.1/", entry) == (400, "image_host")
            assert await get("http://sub.box.test/", entry, resolver=resolver) != PICTURE
            assert it.connections == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("entry", ["", "*.test", "http://x.test", "x.test/a", "u@x", "::1", "x:y"])
def test_allowed_host_must_be_one(entry: str) -> None:
    with pytest.raises(ValueError, match=r"host|URL|port"):
        ImageFetcher(FetchLimits(1, 1, frozenset({entry})))
