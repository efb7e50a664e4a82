# SPDX-License-Identifier: Apache-2.0
"""A gateway with API keys, as tests hold it."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.gateway.support import HIMAP, metric, post
from tests.servers import Server


@dataclass
class Guarded:
    """A gateway with API keys, what they are, and where it writes its log."""

    server: Server
    keys: dict[str, str]
    entries: dict[str, dict[str, Any]]
    file: Path
    log: Path

    def post(self, body: Any, key: str = "plain", path: str = "/v1/completions") -> Any:
        """Status, headers and body of a request with a key."""
        authorization = {"Authorization": f"Bearer {self.keys[key]}"}
        return post(self.server, path, body, **authorization)

    def write(self, *names: str) -> None:
        """Replace the file by one with these keys, as an operator should: in one step."""
        text = yaml.safe_dump({"keys": [self.entries[name] for name in names]})
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def line(self, request_id: str) -> dict[str, Any]:
        """The log line of a request; it is written when the answer is out."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if '"vllm.himap.request"' in line and f'"{request_id}"' in line:
                    found: dict[str, Any] = json.loads(line)
                    return found
            time.sleep(0.1)
        raise AssertionError(f"no log line of {request_id}")

    def wait_until_idle(self) -> None:
        """Nothing is left of aborted requests: not in the gateway, the engine, or the KV cache."""
        names = (
            "himap_requests_in_flight",
            "vllm:num_requests_running",
            "vllm:kv_cache_usage_perc",
        )
        deadline = time.monotonic() + 10
        while any(metric(self.server, name) for name in names):
            assert time.monotonic() < deadline, {n: metric(self.server, n) for n in names}
            # Gauges of the engine follow its steps.
            self.post({"model": "tiny", "prompt": "hi", "max_tokens": 1})
            time.sleep(0.1)


def make_key(name: str) -> tuple[str, dict[str, Any]]:
    """A key and its entry, as the operator gets them."""
    text = subprocess.run([HIMAP, "key", name], check=True, capture_output=True, text=True).stdout
    (entry,) = yaml.safe_load(text)
    return text.splitlines()[0].split()[-1], entry
