# SPDX-License-Identifier: Apache-2.0
"""Fetch the images that requests name by URL, from public addresses only."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ..errors import GatewayError, Reason

_PORTS = frozenset({80, 443})
_HEADERS = {
    "Accept": "image/png, image/jpeg, image/webp, image/gif",
    "Accept-Encoding": "identity",
    "User-Agent": "himap-vllm",
}
# Object stores know images as octet streams; the magic bytes decide (images.py).
_TYPES = re.compile(r"image/(png|jpe?g|webp|gif)|(application|binary)/octet-stream", re.IGNORECASE)
_MAX_URL = 8192
_MAX_ADDRESSES = 8

_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")  # and not 64:ff9b:1::/48, which is for local use (RFC 8215)
# Global to `ipaddress`, at least in some patch releases of Python, and yet not the internet.
_NOT_PUBLIC = (
    ip_network("168.63.129.16/32"),  # Azure's platform service
    ip_network("192.0.0.0/24"),  # IETF protocol assignments; Oracle Cloud's metadata service
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("3fff::/20"),  # documentation
)

# One text for "not public", "unknown" and "closed": it maps nobody's internal network.
_UNREACHABLE = (
    "the image's URL cannot be fetched: its host has no public address, or does not answer; "
    "check the URL, or send the image as a data URL"
)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What a fetch may take.

    Attributes:
        timeout_seconds: for the whole fetch, redirects included.
        allowed_hosts: "host" (any port) or "host:port", which may be private; IPv6 in brackets.
            A name is trusted together with whoever resolves it.
    """

    max_bytes: int
    timeout_seconds: float
    allowed_hosts: frozenset[str]
    max_redirects: int = 3


class ImageFetcher:
    """Fetches images without becoming a way into the operator's network.

    One parser: the URL object that was checked is the one that is dialled (CVE-2026-24779: check
    and client understood a backslash differently). One resolution: the address is checked where
    aiohttp makes the socket for it, so no second look-up can answer differently (vLLM #57157: DNS
    rebinding) and no spelling gets around the check (GHSA-3f6c-7fw2-ppm4); a name's addresses that
    aren't public are passed over. Redirects are followed by hand, each hop checked anew. The hosts
    that the operator allows go through a connector of their own, without the check.
    """

    def __init__(self, limits: FetchLimits, resolver: AbstractResolver | None = None) -> None:
        """`resolver` is for operators with a DNS of their own; the fetcher closes it.

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
        """The bytes behind a URL; `check_image` has yet to see them.

        Args:
            url: as the client gave it.
            param: the field of the request that holds it.
            take: is told of every piece's bytes as they come, and may refuse by raising.

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
            # ValueError: a host name that DNS cannot express.
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
        if allowed not in self._sessions:  # not in __init__: aiohttp wants a running event loop
            self._resolver = self._resolver or FreshResolver()
            self._sessions[allowed] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # who has many fetches that stall must not hold up the others
                    resolver=_ShortResolver(self._resolver),
                    socket_factory=None if allowed else _guarded_socket,
                    use_dns_cache=False,
                    force_close=True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(),  # none: fetch() has one for all hops
                trust_env=False,  # a proxy would resolve the name again
                auto_decompress=False,  # max_bytes would not bound the memory
            )
        return self._sessions[allowed]

    async def _read(self, response: aiohttp.ClientResponse, take: Callable[[int], None]) -> bytes:
        if response.status != 200:
            message = f"the image's URL answered with status {response.status} instead of 200"
            raise _RefusedError(Reason.IMAGE_FETCH, message)
        kind = response.headers.get("Content-Type") or "application/octet-stream"
        if not _TYPES.fullmatch(kind.partition(";")[0].strip()):
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
    """An OSError, because aiohttp then goes on to the name's next address."""


class FreshResolver(AbstractResolver):
    """aiohttp's asynchronous resolver, replaced after a number of look-ups.

    c-ares keeps answers for up to an hour in a cache without bound, whatever `use_dns_cache` says,
    and who owns a name chooses how many and how large they are. Can go when pycares (5.2) can turn
    that off.
    """

    _LOOK_UPS = 64

    def __init__(self, **options: Any) -> None:
        """`options` of `aiodns.DNSResolver`."""
        self._options = {"tries": 3, **options}  # with any, aiohttp shares it with nobody
        self._running: dict[AbstractResolver, int] = {}  # look-ups; the newest resolver is last
        self._used = 0

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

    async def close(self) -> None:
        for resolver in self._running:
            await resolver.close()
        self._running.clear()


class _ShortResolver(AbstractResolver):
    """The first few addresses of a name.

    aiohttp's work grows with the square of their number, and the name's owner chooses it: with a
    thousand (one answer holds four thousand) the event loop is busy for many seconds.
    """

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return (await self._inner.resolve(host, port, family))[:_MAX_ADDRESSES]

    async def close(self) -> None:
        """The inner one outlives a connector."""


def _guarded_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    if not _is_public(str(info[4][0])):
        # One text for all: where several addresses fail alike, aiohttp raises the first error.
        raise _NotPublicError("not a public address")
    return socket.socket(*info[:3])


def _is_public(host: str) -> bool:
    """Whether it is an address (and not a name) on the internet."""
    if "%" in host:  # a zone is for addresses on a link
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
    # Multicast is global to `ipaddress`; Teredo is not.
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_link_local)
        and not any(address in network for network in _NOT_PUBLIC)
    )


def _parse(text: str, base: URL | None = None) -> URL:
    try:
        # Spaces, control and invisible characters: what parsers disagree about (CVE-2026-24779).
        if len(text) > _MAX_URL or not text.isprintable() or not {" ", "\\"}.isdisjoint(text):
            raise ValueError
        url = URL(text) if base is None else base.join(URL(text))
        if url.scheme not in ("http", "https") or not url.raw_host or url.raw_user is not None:
            raise ValueError
        if url.raw_password is not None:
            raise ValueError
    except ValueError:
        message = "must be an http or https URL without credentials, or a data URL of an image"
        raise _RefusedError(Reason.IMAGE_URL, message) from None
    return url


def host_and_port(text: str) -> tuple[str, int | None]:
    """An allowed host's parts; None: any port.

    Raises:
        ValueError: neither "host" nor "host:port".
    """
    url = URL(f"http://{text}")
    host = str(url.raw_host).rstrip(".")
    if not host or "*" in host or url != url.origin():
        raise ValueError(f"neither a host nor host:port: {text!r}")
    return host, url.explicit_port
