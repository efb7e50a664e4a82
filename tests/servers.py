# SPDX-License-Identifier: Apache-2.0
"""Server processes on loopback, stopped by the test that started them."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Server:
    """A running process and where it listens."""

    process: subprocess.Popen[bytes]
    url: str

    def status(self, path: str) -> int:
        """HTTP status of a GET; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_for(self, path: str, seconds: float = 300) -> None:
        """Wait until a GET answers 200."""
        deadline = time.monotonic() + seconds
        while self.status(path) != 200:
            status = self.process.poll()
            assert status is None, f"{self.process.args!r} ended with {status}"
            assert time.monotonic() < deadline, f"{path} did not answer in {seconds} s"
            time.sleep(0.5)


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
) -> Iterator[Server]:
    """Run `command` with `--host` and a free `--port`; ends it in the end.

    What it prints goes to `log`, if there is one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    full = {**os.environ, **environment}
    full.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    output = None if log is None else log.open("wb")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=full, stdout=output
    )
    try:
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if output is not None:
            output.close()


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
