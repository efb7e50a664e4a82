# SPDX-License-Identifier: Apache-2.0
"""Fetches images by URL, from public addresses only."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import quote, urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from typing_extensions import override
from yarl import URL

from himap_vllm import __version__

from ..errors import GatewayError, Reason
from .images import may_be_image

USER_AGENT = f"himap-vllm/{__version__} (image fetcher; +https://arxiv.org/abs/2503.13108)"
"""Name, version and a page about it: hosts such as Wikimedia refuse an agent without them."""

_PORTS = frozenset({80, 443})
_HEADERS = {
    "Accept": "image/png, image/jpeg, image/webp, image/gif",
    "Accept-Encoding": "identity",
}
_MAX_URL = 8192
# Scheme, authority and the rest of a reference (RFC 3986, appendix B), its fragment gone.
_REFERENCE = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?]*))?(.*)")
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]")
_ASCII = "".join(map(chr, range(0x21, 0x7F)))
_MAX_ADDRESSES = 8

_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")  # and not 64:ff9b:1::/48, which is for local use (RFC 8215)
# Not public, although `ipaddress` calls these global, at least in some patch releases of Python.
_NOT_PUBLIC = (
    ip_network("168.63.129.16/32"),  # Azure's platform service
    ip_network("192.0.0.0/24"),  # IETF protocol assignments; Oracle Cloud's metadata service
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("3fff::/20"),  # documentation
)

# One text for "not public", "unknown" and "closed", so that nobody can map an internal network.
_UNREACHABLE = (
    "the image's URL cannot be fetched: its host has no public address, or does not answer; "
    "check the URL, or send the image as a data URL"
)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of a fetch.

    Attributes:
        timeout_seconds: for the whole fetch, redirects included.
        allowed_hosts: "host" (any port) or "host:port"; they may be private. IPv6 in brackets. To
            allow a name is to trust those who resolve it.
        user_agent: the header by which the fetched hosts know this server.
    """

    max_bytes: int
    timeout_seconds: float
    allowed_hosts: frozenset[str]
    max_redirects: int = 3
    user_agent: str = USER_AGENT


class ImageFetcher:
    """Fetches images, and gives nobody a way into the operator's network.

    * One parser: aiohttp connects to the URL object that was checked (CVE-2026-24779: check and
      client read a backslash differently).
    * One resolution: the address is checked where aiohttp makes the socket for it. So no second
      look-up can answer differently (vLLM #57157: DNS rebinding), and no spelling evades the check
      (GHSA-3f6c-7fw2-ppm4). Addresses of a name that are not public are skipped.
    * Redirects: this class follows them itself, and checks each hop.
    * Allowed hosts go through a connector of their own, without the check of the address.
    """

    def __init__(self, limits: FetchLimits, resolver: AbstractResolver | None = None) -> None:
        """`resolver` is for operators with their own DNS; the fetcher closes it.

        Raises:
            ValueError: an allowed host is neither "host" nor "host:port".
        """
        self._limits = limits
        self._allowed = frozenset(map(host_and_port, limits.allowed_hosts))
        self._resolver = resolver
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def fetch(
        self, url: str, param: str, take: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """The bytes of a URL, not yet checked by `check_image`.

        Args:
            url: as the client gave it.
            param: the field of the request that holds it.
            take: called with the number of bytes of every piece; it may refuse by raising.

        Raises:
            GatewayError: HTTP 400, or 413 for too many bytes.
        """
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                return await self._follow(_parse(url), take)
        except _RefusedError as error:
            raise GatewayError(error.status, str(error), reason=error.reason, param=param) from None
        except TimeoutError:
            seconds = f"{self._limits.timeout_seconds:g} s"
            message = f"the image's URL took longer than {seconds}; send a data URL instead"
            raise GatewayError(400, message, reason=Reason.IMAGE_FETCH, param=param) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: a host name that is impossible in DNS.
            private = isinstance(getattr(error, "os_error", None), _NotPublicError)
            reason = Reason.IMAGE_HOST if private else Reason.IMAGE_FETCH
            raise GatewayError(400, _UNREACHABLE, reason=reason, param=param) from None

    async def close(self) -> None:
        """Close the connections and the resolver."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
        if self._resolver is not None:
            await self._resolver.close()

    async def _follow(self, url: URL, take: Callable[[int], None]) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with self._session(url).get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    return await self._read(response, take)
            url = _parse(location, base=url)
        message = f"the image's URL redirects more than {self._limits.max_redirects} times"
        raise _RefusedError(Reason.IMAGE_FETCH, message)

    def _session(self, url: URL) -> aiohttp.ClientSession:
        host = str(url.raw_host).rstrip(".")
        allowed = not self._allowed.isdisjoint({(host, None), (host, url.port)})
        if not allowed and url.port not in _PORTS:
            raise _RefusedError(Reason.IMAGE_URL, "the image's URL must use port 80 or 443")
        if allowed not in self._sessions:  # not in __init__: aiohttp needs a running event loop
            self._resolver = self._resolver or FreshResolver()
            self._sessions[allowed] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # stalled fetches of one client must not delay the others
                    resolver=_ShortResolver(self._resolver),
                    socket_factory=None if allowed else _guarded_socket,
                    use_dns_cache=False,
                    force_close=True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={**_HEADERS, "User-Agent": self._limits.user_agent},
                timeout=aiohttp.ClientTimeout(),  # none: fetch() has one for all hops
                trust_env=False,  # a proxy would resolve the name again
                auto_decompress=False,  # max_bytes would not bound the memory
            )
        return self._sessions[allowed]

    async def _read(self, response: aiohttp.ClientResponse, take: Callable[[int], None]) -> bytes:
        if response.status != 200:
            message = f"the image's URL answered with status {response.status} instead of 200"
            raise _RefusedError(Reason.IMAGE_FETCH, message)
        # Object stores send images as any bytes. The magic bytes decide (images.py).
        if not may_be_image(response.headers.get("Content-Type", "")):
            message = "the image's URL must answer with a PNG, JPEG, WebP or GIF content type"
            raise _RefusedError(Reason.IMAGE_TYPE, message)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            message = "the image's URL must answer without a content encoding"
            raise _RefusedError(Reason.IMAGE_FETCH, message)
        self._check_size(response.content_length or 0)
        body = bytearray()
        async for chunk in response.content.iter_any():
            take(len(chunk))
            body += chunk
            self._check_size(len(body))
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            message = f"the image has more than {self._limits.max_bytes} bytes; make it smaller"
            raise _RefusedError(Reason.IMAGE_BYTES, message, 413)


class _RefusedError(Exception):
    def __init__(self, reason: Reason, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class _NotPublicError(OSError):
    """An OSError, so that aiohttp tries the name's next address."""


class FreshResolver(AbstractResolver):
    """aiohttp's asynchronous resolver, replaced after a number of look-ups.

    * `aiohttp.AsyncResolver` (called): c-ares keeps answers for up to an hour in a cache without a
      limit, whatever `use_dns_cache` says, and the owner of a name chooses how many answers there
      are and how large. Remove when: pycares (5.2) can turn the cache off.
    """

    _LOOK_UPS = 64

    def __init__(self, **options: Any) -> None:
        """`options` of `aiodns.DNSResolver`."""
        self._options = {"tries": 3, **options}  # aiohttp shares only resolvers without options
        self._running: dict[AbstractResolver, int] = {}  # look-ups; the newest resolver is last
        self._used = 0

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self._used += 1
        if self._used % self._LOOK_UPS == 1:
            idle = [resolver for resolver, number in self._running.items() if not number]
            self._running[aiohttp.AsyncResolver(**self._options)] = 0
            for resolver in idle:
                del self._running[resolver]
                await resolver.close()
        resolver = next(reversed(self._running))
        self._running[resolver] += 1
        try:
            return await resolver.resolve(host, port, family)
        finally:
            self._running[resolver] -= 1

    @override
    async def close(self) -> None:
        for resolver in self._running:
            await resolver.close()
        self._running.clear()


class _ShortResolver(AbstractResolver):
    """The first few addresses of a name.

    aiohttp's work grows with the square of their number, which the owner of the name chooses. A
    thousand addresses keep the event loop busy for many seconds; one answer can have four thousand.
    """

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return (await self._inner.resolve(host, port, family))[:_MAX_ADDRESSES]

    @override
    async def close(self) -> None:
        """Nothing: the inner resolver outlives a connector."""


def _guarded_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    if not _is_public(str(info[4][0])):
        # One text for all: if several addresses fail alike, aiohttp raises the first error.
        raise _NotPublicError("not a public address")
    return socket.socket(*info[:3])


def _is_public(host: str) -> bool:
    """Whether `host` is a public address, and not a name."""
    if "%" in host:  # only link-local addresses have a zone
        return False
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is None and address not in _GLOBAL_UNICAST:
            return False
        address = embedded or address
    # `ipaddress` calls multicast global, but not Teredo.
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_link_local)
        and not any(address in network for network in _NOT_PUBLIC)
    )


def _parse(text: str, base: URL | None = None) -> URL:
    """The URL of a reference, with the bytes of its path and query as they are given.

    A signature is over these bytes: `%2F` must not become `/`, nor `%7E` become `~`. Only what a
    request line cannot hold is quoted: spaces, and other characters as UTF-8.

    Raises:
        _RefusedError: it is no http(s) URL, or one that parsers disagree about.
    """
    try:
        text = text.strip(" \t\r\n\f").partition("#")[0]
        # Parsers disagree about backslashes and control characters (CVE-2026-24779).
        if len(text) > _MAX_URL or _AMBIGUOUS.search(text):
            raise ValueError
        match = _REFERENCE.fullmatch(text)
        scheme, authority, rest = match.groups() if match else (None, None, "")
        rest = quote(rest, safe=_ASCII)
        if authority is None:
            if scheme is not None or base is None:
                raise ValueError
            # Not URL.join, which decodes the base's path.
            return _same_host(base, urljoin(str(base), rest))
        if base is not None:
            scheme = scheme or base.scheme
        # Unlike path and query, the host needs yarl's normal form (IDNA).
        origin = URL(f"{scheme}://{authority}")
        if origin.scheme not in ("http", "https") or not origin.raw_host:
            raise ValueError
        if not authority.isprintable() or " " in authority:
            raise ValueError
        if origin.raw_user is not None or origin.raw_password is not None:
            raise ValueError
        path = rest if rest.startswith("/") else f"/{rest}"
        return _same_host(origin, f"{origin.origin()}{path}")
    except ValueError:
        message = "must be an http or https URL without credentials, or a data URL of an image"
        raise _RefusedError(Reason.IMAGE_URL, message) from None


def _same_host(origin: URL, text: str) -> URL:
    url = URL(text, encoded=True)
    if (url.scheme, url.raw_host, url.port) != (origin.scheme, origin.raw_host, origin.port):
        raise ValueError
    return url


def host_and_port(text: str) -> tuple[str, int | None]:
    """Host and port of an allowed host; None: any port.

    Raises:
        ValueError: neither "host" nor "host:port".
    """
    url = URL(f"http://{text}")
    host = str(url.raw_host).rstrip(".")
    if not host or "*" in host or url != url.origin():
        raise ValueError(f"must be host or host:port, got {text!r}")
    return host, url.explicit_port
