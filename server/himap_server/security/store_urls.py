# SPDX-License-Identifier: Apache-2.0
"""URLs of servers that hold the limits of API keys, and what may be said of them."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
"""Schemes that operators may write, and what the client of Redis calls them."""


def address_of(url: str) -> str:
    """Scheme, host, port and database of a URL, without user and password.

    Raises:
        ValueError: it is not the URL of a Redis or Valkey server. The message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError("must be redis://, rediss://, valkey:// or valkeys:// with a host")
    return f"{parts.scheme}://{parts.hostname}:{port}{parts.path}"
