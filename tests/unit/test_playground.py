# SPDX-License-Identifier: Apache-2.0
"""When there is a playground, and where."""

from __future__ import annotations

import pytest
from himap_server.playground.routes import address, is_on
from himap_server.settings import load


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_by_default_on_loopback_only(host: str) -> None:
    assert is_on(host, None)
    assert not is_on(host, False)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "10.0.0.1", "gateway.example"])
def test_beyond_loopback_only_if_wanted(host: str | None) -> None:
    assert not is_on(host, None)
    assert is_on(host, True)


@pytest.mark.parametrize(
    ("host", "root", "expected"),
    [
        (None, "", "http://localhost:80/playground"),
        ("0.0.0.0", "/proxy/", "http://localhost:80/proxy/playground"),
        ("::1", "", "http://[::1]:80/playground"),
        ("10.0.0.1", "", "http://10.0.0.1:80/playground"),
    ],
)
def test_address(host: str | None, root: str, expected: str) -> None:
    assert address(host, 80, root) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("", None), ("true", True), ("0", False), (None, None)]
)
def test_setting(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: object) -> None:
    if given is not None:
        monkeypatch.setenv("HIMAP_PLAYGROUND", given)
    assert load({}, {})[0].playground is expected
