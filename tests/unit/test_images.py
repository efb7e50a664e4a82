# SPDX-License-Identifier: Apache-2.0
"""Safe images: what the gateway fetches, and what it lets through to the engine.

One test or more for each advisory on images in vLLM and its neighbours, named in the test's id.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from himap_server.errors import GatewayError
from himap_server.security import fetch
from himap_server.security.fetch import FetchLimits, FreshResolver, ImageFetcher
from himap_server.security.images import ImageLimits, check_image, decode_data_url, to_data_url
from PIL import Image, UnidentifiedImageError
from yarl import URL

PARAM = "messages[0].content[0].image_url.url"
LIMITS = ImageLimits(max_bytes=100_000, max_pixels=1_000_000, min_side=8)
# What must never reach a client: addresses of hosts and of the heap, exceptions, queries, paths.
LEAK = re.compile(
    r"\d+\.\d+\.\d+|::|0x|object at|BytesIO|Errno|Error|Traceback|secret|/(home|usr|etc|tmp|work)/"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refused(error: GatewayError) -> tuple[int, str]:
    """A refusal's status and reason, once its text is found clean."""
    assert error.param == PARAM
    assert not LEAK.search(error.detail), error.detail
    return error.status_code, error.reason


# ------------------------------------------------------------------------------------- checking


def encode(kind: str, size: tuple[int, int] = (32, 24), **options: Any) -> bytes:
    buffer = BytesIO()
    Image.effect_noise(size, 64).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A header that promises any size, with next to no data."""
    data = chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return png_header(width, height) + b"".join(chunks) + data


def webp_header(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + b"\0" * 80


def jpeg_of(width: int, height: int) -> bytes:
    data = encode("JPEG")
    return data.replace(struct.pack(">HH", 24, 32), struct.pack(">HH", height, width), 1)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(encode("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def animation(kind: str) -> bytes:
    rest = [Image.effect_noise((32, 24), 64 + i) for i in range(2)]
    return encode(kind, save_all=True, append_images=rest)


def check(data: bytes, limits: ImageLimits = LIMITS) -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        check_image(data, limits, PARAM)
    return refused(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_format(kind: str) -> None:
    assert check_image(encode(kind), LIMITS, PARAM).kind == kind


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animation(kind: str) -> None:
    data = animation(kind)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    assert check_image(data, LIMITS, PARAM).kind == kind


FOREIGN = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "tiff": encode("TIFF"),
    "CVE-2026-22778-jpeg2000": encode("JPEG2000"),
    "bmp": encode("BMP"),
    "ico": encode("ICO"),
    "ppm": encode("PPM"),
    "tga": encode("TGA"),
    "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
    "html": b"<!doctype html><title>Sign in</title>",
    "avi-in-riff": b"RIFF\x64\0\0\0AVI LIST" + b"\0" * 100,
    "webp-of-another-kind": b"RIFF\x64\0\0\0WEBPVP9 " + b"\0" * 100,
    "png-behind-junk": b"\n" + encode("PNG"),
    "empty": b"",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_foreign_bytes_are_refused_whatever_is_declared(data: bytes) -> None:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    decoded = decode_data_url(url, LIMITS, PARAM)
    assert decoded == data
    assert check(decoded) == (400, "image_type")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(1001, 1000), id="vLLM-47010-png"),
        pytest.param(png(10_000, 10_000), id="vLLM-47010-png-that-pillow-warns-of"),
        pytest.param(png(2**31 - 1, 2**31 - 1), id="vLLM-47010-png-that-pillow-refuses"),
        pytest.param(png(32, 24, png_header(60_000, 60_000)[8:]), id="png-two-headers"),
        pytest.param(jpeg_of(65_000, 65_000), id="vLLM-47010-jpeg"),
        pytest.param(webp_header(16_000, 16_000), id="vLLM-47010-webp"),
        pytest.param(webp_header(16_000, 16_000).replace(b"d", b"\n", 1), id="webp-newline"),
        pytest.param(gif_of(65_000, 65_000), id="vLLM-47010-gif"),
    ],
)
def test_bomb(data: bytes) -> None:
    assert len(data) < 4000
    assert check(data) == (400, "image_pixels")


def test_pixels_at_the_limit() -> None:
    assert check_image(png(1000, 1000), LIMITS, PARAM).kind == "png"


def test_pillows_own_limit_is_not_touched() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(png(60_000, 60_000)))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 1), id="CVE-2026-22773"),
        pytest.param((7, 64), id="narrow"),
        pytest.param((64, 7), id="flat"),
    ],
)
def test_side(size: tuple[int, int]) -> None:
    assert check(encode("PNG", size)) == (400, "image_side")


def test_side_at_the_limit() -> None:
    assert check_image(encode("PNG", (8, 8)), LIMITS, PARAM).kind == "png"


def test_bytes() -> None:
    data = encode("PNG")
    exact = ImageLimits(len(data), LIMITS.max_pixels, LIMITS.min_side)
    assert check_image(data, exact, PARAM).kind == "png"
    assert check(data + b"\0", exact) == (413, "image_bytes")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_truncated_header(kind: str) -> None:
    data = encode(kind)
    length = 16 if kind == "webp" else 12
    assert check(data[:length]) == (400, "image_broken")


def test_decoder_text_stays_inside() -> None:
    """CVE-2026-22778: "cannot identify image file <_io.BytesIO object at 0x7f...>"."""
    data = png(64, 64).replace(b"\x08\x02\0\0\0", b"\x08\x02\0\0\1")  # the checksum is wrong now
    with pytest.raises(UnidentifiedImageError, match="BytesIO object at 0x"):
        Image.open(BytesIO(data))
    with pytest.raises(GatewayError) as caught:
        check_image(data, LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_broken")
    assert caught.value.__suppress_context__


def test_color_profiles_cannot_keep_a_core_busy() -> None:
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"\0" * 1000))
    assert check_image(png(64, 64, profile), LIMITS, PARAM).kind == "png"
    assert check(png(64, 64, *[profile] * 100)) == (400, "image_broken")


def test_exif_segments_cannot_keep_a_core_busy() -> None:
    data = encode("JPEG")
    segment = b"\xff\xe1\x00\x10Exif\0\0II*\0\x08\0\0\0"
    assert check_image(data[:2] + segment + data[2:], LIMITS, PARAM).kind == "jpeg"
    assert check(data[:2] + segment * 100 + data[2:]) == (400, "image_broken")


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the module's own filter
def test_any_mutation_is_an_image_or_a_refusal() -> None:
    chance = random.Random(0)
    seeds = [encode(kind) for kind in ("png", "jpeg", "webp", "gif")]
    seeds += [animation("gif"), animation("webp"), animation("png"), jpeg_with_odd_metadata()]
    outcomes = set()
    for _ in range(600):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(4, min(len(data), 200))] = chance.choice(b"\0\x01\x7f\xff,!\xda")
        if chance.random() < 0.3:
            del data[chance.randrange(12, len(data)) :]
        try:
            outcomes.add(check_image(bytes(data), LIMITS, PARAM).kind)
        except GatewayError as error:
            outcomes.add(refused(error)[1])
    assert {"png", "jpeg", "webp", "gif", "image_broken", "image_pixels", "image_type"} <= outcomes


def jpeg_with_odd_metadata() -> bytes:
    entry = struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 200) + entry * 3
    body = struct.pack(">H", len(exif) + 2) + exif
    return b"\xff\xd8\xff\xe1" + body + encode("JPEG")[20:]


def test_no_warning_surfaces() -> None:
    """In a process of its own: pytest has its own filters."""
    code = """if True:
        import sys, warnings
        from tests.unit.test_images import LIMITS, ImageLimits, animation, check, check_image
        from tests.unit.test_images import gif_of, jpeg_with_odd_metadata, png
        large = ImageLimits(10**6, 10**9, 1)
        if sys.argv[1] == "control":
            warnings.resetwarnings()
        check_image(jpeg_with_odd_metadata(), LIMITS, "")
        check_image(png(10_000, 10_000), large, "")
        frame = bytearray(gif_of(10, 10))
        at = frame.index(b",", 13 + 768)
        frame[at + 5 : at + 9] = b"\\x10\\x27" * 2
        check_image(bytes(frame), large, "")
    """
    texts = {}
    for name in ("real", "control"):
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", code, name], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        texts[name] = done.stderr
    assert texts["real"] == ""
    assert "UserWarning" in texts["control"]
    assert "DecompressionBombWarning" in texts["control"]


@pytest.mark.parametrize(
    "data",
    [b"BM" + b"\0" * 999, png(9999, 9999), png(4, 4), png_header(64, 64), b"\0" * 100_001],
    ids=["image_type", "image_pixels", "image_side", "image_broken", "image_bytes"],
)
def test_refused_bytes_are_freed_at_once(data: bytes) -> None:
    """Without waiting for the collector of cycles, which large images would outrun."""
    data = bytes(bytearray(data))
    before = sys.getrefcount(data)
    gc.disable()
    try:
        with suppress(GatewayError):
            assert not check_image(data, LIMITS, PARAM)
        assert sys.getrefcount(data) == before
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------ data URLs


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_data_url_round_trip(kind: str) -> None:
    data = encode(kind)
    assert decode_data_url(to_data_url(kind, data), LIMITS, PARAM) == data


@pytest.mark.parametrize("prefix", ["DATA:Image/PNG;Base64,", "data:image/jpg;base64,"])
def test_data_url_spellings(prefix: str) -> None:
    assert decode_data_url(prefix + "AAAA", LIMITS, PARAM) == b"\0\0\0"


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("data:video/jpeg;base64,", id="CVE-2026-5497"),
        "data:image/svg+xml;base64,",
        "data:image/tiff;base64,",
        "data:image/jp2;base64,",
        "data:image/jpeg2000;base64,",
        "data:image/*;base64,",
        "data:image/png,",
        "data:image/png;base64",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;base64;base64,",
        "data:;base64,",
        "data:,",
        "data:application/octet-stream;base64,",
        "data:image/png ;base64,",
        " data:image/png;base64,",
        "data:image/png;base64 ,",
        "xdata:image/png;base64,",
        "https://x.test/data:image/png;base64,",
        "",
    ],
)
def test_data_url_types(prefix: str) -> None:
    with pytest.raises(GatewayError) as caught:
        decode_data_url(prefix + "AAAA", LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_type")


@pytest.mark.parametrize(
    "junk",
    ["A", "AAA", "AA=A", "AAAA====", "AA\nAA", "AA AA", "AA-_", "AAé=", "AA%3D", "\udc80AAA"],
)
def test_data_url_base64_is_strict(junk: str) -> None:
    with pytest.raises(GatewayError) as caught:
        decode_data_url("data:image/png;base64," + junk, LIMITS, PARAM)
    assert refused(caught.value) == (400, "image_broken")


def test_data_url_length_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, too_long = base64.b64encode(b"\0" * 100_000).decode(), "*" * 140_000
    assert len(decode_data_url("data:image/png;base64," + fits, LIMITS, PARAM)) == 100_000
    monkeypatch.setattr("himap_server.security.images.pybase64", None)
    with pytest.raises(GatewayError) as caught:
        decode_data_url("data:image/png;base64," + too_long, LIMITS, PARAM)
    assert refused(caught.value) == (413, "image_bytes")


# ------------------------------------------------------------------------------------- fetching

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
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is not None:
                writer.write(self.answer)
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
) -> bytes | tuple[int, str]:
    """What was fetched, or the status and reason of the refusal."""
    limits = FetchLimits(max_bytes, timeout, frozenset(allowed))
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


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loopback address counts as public."""
    is_public = fetch._is_public
    monkeypatch.setattr(fetch, "_is_public", lambda host: host == PUBLIC or is_public(host))


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
        "http://good.test/\t",
        "http://good.test\0.evil.test/",
        "http://good.test /",
        " http://good.test/",
        "http://good.test/\u2028",
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
            "User-Agent": "himap-vllm",
        }

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
            fetcher = ImageFetcher(FetchLimits(100_000, 3, frozenset()), resolver)
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
            raise GatewayError(413, "together too large", reason="image_bytes", param=PARAM)

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
    "kind", ["text/html", "image/svg+xml", "image/tiff", "video/jpeg", "image/"]
)
def test_content_type_is_refused(kind: str) -> None:
    assert asyncio.run(get_from(http(Content_Type=kind))) == (400, "image_type")


@pytest.mark.parametrize(
    "kind",
    [
        *("image/png", "IMAGE/JPEG", "image/jpg; q=1", "image/webp ;x", "image/gif"),
        *("application/octet-stream", "binary/octet-stream", ""),
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
    seeds = ["http://name.test:80/a?b#c", "https://[::1]/", "http://127.0.0.1/", "http://ä.test/"]
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
