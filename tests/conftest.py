# SPDX-License-Identifier: Apache-2.0
"""What all tests share; light, as tests without an engine begin with it, too."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import environment, interpreter

if TYPE_CHECKING:
    from tests.world import World

__all__ = ["environment"]  # imported for its effect
pytest_plugins = ("tests.workers",)

# Their asserts tell what they compared, as those of test files do.
pytest.register_assert_rewrite(
    "tests.engines", "tests.gateway.hostile", "tests.gateway.support", "tests.world"
)

if not interpreter.WANTED:
    collect_ignore = ["interpreted"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from tests.world import World

    yield World(tmp_path_factory.mktemp("checkpoints"))
    gc.freeze()  # engines collect garbage as they end
