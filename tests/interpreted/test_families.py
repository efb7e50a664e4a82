# SPDX-License-Identifier: Apache-2.0
"""Every family on Model Runner V2."""

from __future__ import annotations

import pytest

from tests import test_families
from tests.conftest import World
from tests.families import TINY


@pytest.mark.parametrize("name", TINY)
def test_a_mixed_batch_equals_the_oracle(world: World, name: str) -> None:
    """Every other case: each ratio pair, each prompt, unpruned and text-only ones."""
    cases = test_families.cases(TINY[name].image)[::2]
    test_families.equal_oracle(world, world.engine(name), name, cases)
