# SPDX-License-Identifier: Apache-2.0
"""Servers that tests start, and chat messages for them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from himap_eval.local_server import LocalServer as Server
from himap_eval.local_server import launch
from PIL import Image

__all__ = ["Server", "picture_message", "running"]


def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
) -> AbstractContextManager[Server]:
    """Run `command` on a free port, with `environment` over the test's own, as users would."""
    full = {**os.environ, **environment}
    full.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the tests' engines are in their own process
    return launch(command, full, log)


def picture_message(image: Image.Image, question: str) -> Any:
    """A chat message with a picture as a data URL (PNG, lossless)."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": question},
        ],
    }
