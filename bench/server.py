# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process on a free local port, its caches and its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

START_SECONDS = 900.0  # the first start compiles
STOP_SECONDS = 60.0


class Histogram(NamedTuple):
    """What is left of a Prometheus histogram without its buckets."""

    total: float
    number: int


class Server:
    """vLLM's OpenAI-compatible server; a context manager that starts and stops it."""

    ready_path = "/health"  # answers 200 when the model does

    def __init__(self, model: Path, arguments: Sequence[str], plugins: str, log: Path) -> None:
        """Prepare, but don't start yet.

        Args:
            model: checkpoint directory; its name is the served model's name.
            arguments: options of `vllm serve`.
            plugins: `VLLM_PLUGINS`, empty for none.
            log: where its output goes.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.model_name = model.name
        self.log = log
        # The command beside this interpreter, so that both are of one environment.
        vllm = shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm"
        self.command = [
            vllm, "serve", str(model), "--served-model-name", self.model_name,
            "--host", "127.0.0.1", "--port", str(port), *arguments,
        ]  # fmt: skip
        self._environment = {
            **os.environ,
            "VLLM_PLUGINS": plugins,
            "HF_HUB_OFFLINE": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for the /reset_* endpoints; local port only
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group to stop as a whole
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"the server ended during start-up; {self.log} ends:\n{tail}")
            with contextlib.suppress(OSError):  # URLError, refused connections
                self._request("GET", self.ready_path)
                return
            time.sleep(1)
        raise TimeoutError(f"the server was not ready after {START_SECONDS:.0f} s; see {self.log}")

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"the server did not stop by itself, killing it; see {self.log}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None

    def _request(self, method: str, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            reply: bytes = response.read()
        return reply

    def empty_caches(self) -> None:
        """Forget prompts, images and their embeddings: cells share a server and its requests."""
        reply = json.loads(self._request("POST", "/reset_prefix_cache"))
        if not reply["success"]:
            raise RuntimeError("the prefix cache could not be emptied: requests are running")
        self._request("POST", "/reset_mm_cache")
        self._request("POST", "/reset_encoder_cache")

    def wake(self) -> None:
        """Run one short prompt without an image: the first after a pause takes longer."""
        body = {"model": self.model_name, "prompt": "Hello", "max_tokens": 4}
        self._request("POST", "/v1/completions", body)

    def histogram(self, name: str, count: int = 0) -> Histogram:
        """A Prometheus histogram of this server, once it has counted up to `count`.

        Raises:
            TimeoutError: it did not get there.
        """
        for _ in range(50):
            values = {"sum": 0.0, "count": 0.0}
            for line in self._request("GET", "/metrics").decode().splitlines():
                sample, _, value = line.rpartition(" ")
                metric = sample.partition("{")[0]
                for field in values:
                    if metric == f"{name}_{field}":
                        values[field] += float(value)
            if values["count"] >= count:
                return Histogram(values["sum"], int(values["count"]))
            time.sleep(0.1)
        raise TimeoutError(f"{name} has counted {values['count']:.0f}, not {count}")

    def pruning_stats(self) -> dict[str, Any]:
        """The plugin's counters."""
        stats: dict[str, Any] = json.loads(self._request("GET", "/plugins/himap/stats"))
        return stats
