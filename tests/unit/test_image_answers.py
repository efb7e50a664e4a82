# SPDX-License-Identifier: Apache-2.0
"""Which answers of an image's host the gateway takes.

One test or more for each advisory on images in vLLM and its neighbours, named in the test's id.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from himap_server.errors import GatewayError, Reason
from himap_server.security.fetch import (
    FetchLimits,
    ImageFetcher,
)
from yarl import URL

from tests.unit.image_files import (
    PARAM,
    check,
)
from tests.unit.image_hosts import PICTURE, Resolver, Tap, get, get_from, http, site


def test_declared_size_is_refused_before_reading() -> None:
    answer = http(b"", Content_Length="100001")  # and never a byte of it
    assert asyncio.run(get_from(answer)) == (413, "image_bytes")
    assert asyncio.run(get_from(http(b"\0" * 100_000))) == b"\0" * 100_000


def test_a_budget_ends_a_fetch_that_would_exceed_it() -> None:
    """All images of a request are fetched at once: their sum is looked at while they come."""
    sent = taken = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        while True:
            await response.write(b"\0" * 50_000)
            sent += 50_000

    def take(number: int) -> None:
        nonlocal taken
        taken += number
        if taken > 200_000:
            raise GatewayError(413, "too large", reason=Reason.IMAGE_BYTES, param=PARAM)

    async def scenario() -> None:
        async with site(handler) as port:
            fetcher = ImageFetcher(FetchLimits(1 << 30, 5, frozenset({f"127.0.0.1:{port}"})))
            fetches = [fetcher.fetch(f"http://127.0.0.1:{port}/", PARAM, take) for _ in range(4)]
            for outcome in await asyncio.gather(*fetches, return_exceptions=True):
                assert isinstance(outcome, GatewayError)
                assert outcome.status_code == 413
            await fetcher.close()

    asyncio.run(scenario())
    assert 200_000 < sent < 80_000_000  # what fits in the sockets' buffers


@pytest.mark.parametrize("chunked", [True, False])
def test_undeclared_size_is_cut_off(chunked: bool) -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        if not chunked:
            response.force_close()
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(b"\0" * 50_000)
            sent += 50_000

    async def scenario() -> None:
        async with site(handler) as port:
            here = f"127.0.0.1:{port}"
            assert await get(f"http://{here}/", here) == (413, "image_bytes")

    asyncio.run(scenario())
    assert 0 < sent < 20_000_000  # what fits in the sockets' buffers


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity"])
def test_content_encoding_is_refused(coding: str) -> None:
    answer = http(gzip.compress(PICTURE), Content_Encoding=coding)
    assert asyncio.run(get_from(answer)) == (400, "image_fetch")


def test_identity_is_no_encoding() -> None:
    assert asyncio.run(get_from(http(PICTURE, Content_Encoding="identity"))) == PICTURE


@pytest.mark.parametrize("allowed", [True, False])
def test_settings_behind_the_checks(allowed: bool) -> None:
    """A second line: no test above fails for want of one of these alone."""

    async def scenario() -> None:
        hosts = frozenset({"x.test"} if allowed else ())
        fetcher = ImageFetcher(FetchLimits(1, 1, hosts))
        session = fetcher._session(URL("http://x.test/"))
        connector = session.connector
        assert isinstance(connector, aiohttp.TCPConnector)
        assert connector.force_close
        assert not connector.use_dns_cache
        assert not session.auto_decompress
        assert not session.trust_env
        assert isinstance(session.cookie_jar, aiohttp.DummyCookieJar)
        await fetcher.close()
        assert session.closed

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "kind", ["text/html", "image/svg+xml", "image/tiff", "video/jpeg", "image/", "text/plainer"]
)
def test_content_type_is_refused(kind: str) -> None:
    assert asyncio.run(get_from(http(Content_Type=kind))) == (400, "image_type")


@pytest.mark.parametrize(
    "kind",
    [
        *("image/png", "IMAGE/JPEG", "image/jpg; q=1", "image/webp ;x", "image/gif"),
        *("application/octet-stream", "binary/octet-stream", "", "image/pjpeg", "image/x-png"),
        *("application/x-download", "text/plain; charset=utf-8", "image/*", "image", ";"),
    ],
)
def test_content_type_is_accepted(kind: str) -> None:
    assert asyncio.run(get_from(http(Content_Type=kind))) == PICTURE


def test_html_that_calls_itself_a_image() -> None:
    body = asyncio.run(get_from(http(b"<html>internal status page</html>")))
    assert isinstance(body, bytes)
    assert check(body) == (400, "image_type")


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Part"])
def test_status(status: str) -> None:
    assert asyncio.run(get_from(http(status=status))) == (400, "image_fetch")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"-ERR unknown command 'GET'\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        http()[:-1],
        b"\r\n",
    ],
    ids=["ssh", "redis", "long-header", "length", "lengths", "chunk", "short", "nothing"],
)
def test_bad_http(answer: bytes) -> None:
    assert asyncio.run(get_from(answer)) == (400, "image_fetch")


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the URL's name, though an address is dialled."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-subj", "/CN=x", "-addext", "subjectAltName=DNS:good.test"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)

    async def scenario() -> Sequence[object]:
        it = Tap(http())
        server = await asyncio.start_server(it.serve, "127.0.0.1", 0, ssl=ours)
        port = server.sockets[0].getsockname()[1]
        resolver = Resolver(port, good_test=[["127.0.0.1"]], bad_test=[["127.0.0.1"]])
        names = ("good.test", "good.test.", "bad.test")
        outcomes = [await get(f"https://{name}/", *names, resolver=resolver) for name in names]
        server.close()
        return outcomes

    assert asyncio.run(scenario()) == [(400, "image_fetch")] * 3
    theirs = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", theirs)
    assert asyncio.run(scenario()) == [PICTURE, PICTURE, (400, "image_fetch")]


def test_any_url_is_a_refusal() -> None:
    chance = random.Random(0)
    seeds = [
        "http://name.test:80/a?b#c",
        " http://name.test/%2F ",
        "https://[::1]/",
        "http://127.0.0.1/",
        "http://ä.test/",
    ]
    alphabet = "\\/:@?#[]%.0x~\t é\u3002\uff0f\u2100\udc80-_1aß"

    async def scenario() -> set[object]:
        outcomes: set[object] = set()
        for _ in range(500):
            text = list(chance.choice(seeds))
            for _ in range(chance.randint(1, 4)):
                text[chance.randrange(len(text))] = chance.choice(alphabet)
            outcomes.add(await get("".join(text), resolver=Resolver(80)))
        return outcomes

    reasons = {"image_url", "image_host", "image_fetch"}
    assert asyncio.run(scenario()) == {(400, reason) for reason in reasons}
