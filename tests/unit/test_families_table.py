# SPDX-License-Identifier: Apache-2.0
"""The row that docs/adding-a-model.md shows is one of the table."""

import re
from pathlib import Path

from himap_vllm.model.families import ADDING_A_MODEL, FAMILIES, Family

ROOT = Path(__file__).parents[2]


def test_the_row_of_the_guide_is_one_of_the_table() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / ADDING_A_MODEL).read_text(), re.DOTALL)
    row = eval(snippet, {"Family": Family})
    assert row == FAMILIES[row.architecture]
