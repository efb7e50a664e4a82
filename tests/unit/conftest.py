# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests without an engine."""

from __future__ import annotations

import pytest


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loopback address counts as public."""
    from himap_server.security import fetch

    from tests.unit.image_hosts import PUBLIC

    is_public = fetch._is_public
    monkeypatch.setattr(fetch, "_is_public", lambda host: host == PUBLIC or is_public(host))
