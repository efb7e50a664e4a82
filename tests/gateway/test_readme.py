# SPDX-License-Identifier: Apache-2.0
"""The README's examples of the OpenAI client run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.servers import Server

ROOT = Path(__file__).parents[2]


def test_examples(server: Server) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if "openai.OpenAI()" in block]
    assert len(examples) == 2
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", example],
            cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60,
        ).stdout
        for example in examples
    ]  # fmt: skip
    assert "'kept_deep': 5" in outputs[0]
    assert outputs[1].strip()
