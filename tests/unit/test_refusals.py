# SPDX-License-Identifier: Apache-2.0
"""Reasons of refusals: the table in docs/gateway.md has exactly those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from himap_server.errors import Reason

DOCS = Path(__file__).parents[2] / "docs" / "gateway.md"


def test_the_table_of_reasons_is_the_enum() -> None:
    (section,) = re.findall(r"^### Reasons\n(.*?)^#", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| \d{3} \|", section, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(Reason)
