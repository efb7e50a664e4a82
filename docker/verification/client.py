# SPDX-License-Identifier: Apache-2.0
"""A client of the published ports: probes, one question with a picture, Prometheus' API."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import expect
from .tools import VerificationError

# No proxy, whatever the environment says: it is this machine that is asked.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LOADING_SECONDS = 300.0


def status(url: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """HTTP status and body of an answer; status 0 where nothing answers."""
    request = urllib.request.Request(url, body, {"content-type": "application/json", **headers})
    try:
        with _OPENER.open(request, timeout=60) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def wait_until(
    holds: Callable[[], bool], what: str, seconds: float, alive: Callable[[], bool] = lambda: True
) -> float:
    """Wait; returns the seconds that it took.

    Raises:
        VerificationError: not in time, or `alive` is false.
    """
    started = time.monotonic()
    while not holds():
        waited = time.monotonic() - started
        expect(waited < seconds, f"{what}: not within {seconds:.0f} s")
        expect(alive(), f"{what}: the container ended after {waited:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - started


def ready(url: str, alive: Callable[[], bool] = lambda: True) -> float:
    """Wait until the model answers; returns the seconds that it took."""
    path = f"{url}/health/ready"
    return wait_until(lambda: status(path)[0] == 200, "ready", LOADING_SECONDS, alive)


def ask(url: str, picture: Path, key: str | None = None) -> str:
    """What the bundled model says of the star in README.md's picture.

    Raises:
        VerificationError: it is not cyan, or no image token was dropped.
    """
    code, answer = status(
        f"{url}/v1/chat/completions",
        json.dumps(_question(picture)).encode(),
        **({} if key is None else {"authorization": f"Bearer {key}"}),
    )
    expect(code == 200, f"status {code}: {answer[:300].decode(errors='replace')}")
    found = json.loads(answer)
    text = found["choices"][0]["message"]["content"].strip()
    kept = found["usage"]["himap"]["kept_deep"]
    total = found["usage"]["himap"]["image_tokens"]
    expect(text == "cyan", f"the star is {text!r}, not 'cyan'")
    expect(kept < total, f"{kept} of {total} image tokens were kept")
    return f"'{text}', {kept} of {total} image tokens kept"


def prometheus(url: str, path: str) -> Any:
    """`data` of an answer of Prometheus' API."""
    code, answer = status(f"{url}/api/v1/{path}")
    if code != 200:
        raise VerificationError(f"Prometheus: {path}: status {code}")
    return json.loads(answer)["data"]


def _question(picture: Path) -> dict[str, Any]:
    data = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What color is the star?"},
    ]
    message = {"role": "user", "content": content}
    return {"model": "himap-demo", "messages": [message], "max_tokens": 8, "temperature": 0}
