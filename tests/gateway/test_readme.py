# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the README, the quickstart and `examples` run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.servers import Server

ROOT = Path(__file__).parents[2]
ADDRESS = "http://localhost:8000"  # of the gateway in the examples


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(example: str, folder: Path) -> str:
    """What the example prints when a user saves it and runs it from the repository's root."""
    script = folder / "example.py"
    script.write_text(example)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_clients(server: Server, tmp_path: Path) -> None:
    """Against the tests' gateway, whose model is another: the printed savings are of its image."""
    (chat,) = examples("README.md")
    _offline, responses = examples("docs/quickstart.md")
    assert ADDRESS in chat
    assert ADDRESS in responses
    assert "'kept_deep': 5" in run(chat.replace(ADDRESS, server.url), tmp_path)
    assert run(responses.replace(ADDRESS, server.url), tmp_path).strip()
    by_image = (ROOT / "examples" / "detail.py").read_text()
    assert ADDRESS in by_image
    assert run(by_image.replace(ADDRESS, server.url), tmp_path).splitlines()[-3:] == [
        "high: 36 image tokens, then 36, then 36",
        "low: 36 image tokens, then 9, then 3",
        "auto: 36 image tokens, then 18, then 5",
    ]


def test_offline(tmp_path: Path) -> None:
    offline, _responses = examples("docs/quickstart.md")
    (answer,) = re.findall(r"print\(.*# (.+)$", offline, re.MULTILINE)
    # vLLM logs to the same stream while it ends.
    assert answer in [line.strip() for line in run(offline, tmp_path).splitlines()]
