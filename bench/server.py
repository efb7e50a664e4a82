# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` or `himap serve` on a free local port, its caches, counters and metrics."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from himap_eval.local_server import launch
from prometheus_client.parser import text_string_to_metric_families

VLLM, HIMAP = "vllm", "himap"
START_SECONDS = 900.0  # the first start compiles
READY = {VLLM: "/health", HIMAP: "/health/ready"}


class Histogram(NamedTuple):
    """Sum and count of a Prometheus histogram."""

    total: float
    number: int


class Server:
    """An OpenAI-compatible server; a context manager that starts and stops it."""

    url: str

    def __init__(
        self,
        program: str,
        model: Path,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Prepare; `__enter__` starts it.

        Args:
            program: `VLLM` or `HIMAP`, the command beside this interpreter.
            model: checkpoint directory; its name is the served model's name.
            arguments: options of `serve`.
            log: where its output goes.
            environment: variables to set; `VLLM_PLUGINS` among them.
        """
        self.model_name = model.name
        self.log = log
        self.command = [
            str(Path(sys.executable).with_name(program)), "serve", str(model),
            "--served-model-name", self.model_name, *arguments,
        ]  # fmt: skip
        self._ready = READY[program]
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        self._running = ExitStack()

    def __enter__(self) -> Server:
        with ExitStack() as stack:
            server = stack.enter_context(
                launch(self.command, self._environment, self.log, own_session=True)
            )
            server.wait_for(self._ready, START_SECONDS)
            self._running = stack.pop_all()
        self.url = server.url
        self.process = psutil.Process(server.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _request(self, method: str, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            reply: bytes = response.read()
        return reply

    def empty_caches(self) -> None:
        """Forget prompts, images and their embeddings; needs `VLLM_SERVER_DEV_MODE`."""
        reply = json.loads(self._request("POST", "/reset_prefix_cache"))
        if not reply["success"]:
            raise RuntimeError("the prefix cache could not be emptied: requests are running")
        self._request("POST", "/reset_mm_cache")
        self._request("POST", "/reset_encoder_cache")

    def wake(self) -> None:
        """Run one short prompt without an image: the first after a pause takes longer."""
        body = {"model": self.model_name, "prompt": "Hello", "max_tokens": 4}
        self._request("POST", "/v1/completions", body)

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        text = self._request("GET", "/metrics").decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )

    def histogram(self, name: str, count: int = 0) -> Histogram:
        """A Prometheus histogram of this server, once it has counted up to `count`.

        Raises:
            TimeoutError: it did not get there in five seconds.
        """
        for _ in range(50):
            number = int(self.metric(f"{name}_count"))
            if number >= count:
                return Histogram(self.metric(f"{name}_sum"), number)
            time.sleep(0.1)
        raise TimeoutError(f"{name} has counted {number}, not {count}")

    def pruning_stats(self) -> dict[str, Any]:
        """The plugin's counters."""
        stats: dict[str, Any] = json.loads(self._request("GET", "/plugins/himap/stats"))
        return stats
