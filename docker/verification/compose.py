# SPDX-License-Identifier: Apache-2.0
"""Gateway and Prometheus from docker-compose.yml, as podman-compose starts them."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from . import client
from .report import Report, expect
from .tools import PROJECT, Tools

_GATEWAY = f"{PROJECT}_gateway_1"
_PROMETHEUS = f"{PROJECT}_prometheus_1"
_GATEWAY_PORT, _PROMETHEUS_PORT = "18000", "19090"
_URL = f"http://127.0.0.1:{_GATEWAY_PORT}"
_PROMETHEUS_URL = f"http://127.0.0.1:{_PROMETHEUS_PORT}"
_GPU = ("-f", "docker-compose.yml", "-f", "docker/compose.gpu.yml")
_KEYS = ("-f", "docker-compose.yml", "-f", "docker/compose.keys.yml")
# Two scrapes and two evaluations.
_SCRAPED_SECONDS = 90.0
_MARK = "/var/cache/himap/written-by-verify"


class Compose:
    """The project under a name and on ports of its own."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._program = tools.compose_program()
        self._keys = tools.work / "keys"
        self._settings = {
            "GRAFANA_ADMIN_PASSWORD": "not-started",
            "GATEWAY_ADDRESS": "127.0.0.1",
            "GATEWAY_PORT": _GATEWAY_PORT,
            "PROMETHEUS_PORT": _PROMETHEUS_PORT,
            "API_KEYS_FOLDER": str(self._keys),
            "MODEL": "",
            "SERVE_FLAGS": "",
        }

    def run(self, *arguments: str, **settings: str) -> str:
        """`docker compose ARGUMENTS`, with these variables instead of `.env`'s."""
        return self.tools.run(
            self._program, "-p", PROJECT, *arguments, extra={**self._settings, **settings}
        )

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        self.tools.start(
            self._program, "-p", PROJECT, "down", "--volumes", "-t", "5", extra=self._settings
        )

    def check(self, report: Report) -> None:
        """All checks, in an order in which each finds what it needs."""
        report.check("compose.gpu.yml, merged", self._gpu_configuration)
        report.check("compose: gateway and prometheus start", self._up)
        report.check("published port: the model answers", self._ask)
        report.check("health checks of both images", self._health)
        report.check("user, capabilities, read-only root", self._hardened)
        report.check("limits and /dev/shm", self._limits)
        report.check("prometheus: target and rules", self._prometheus)
        report.check("kill -9 of the engine: restarted", self._killed)
        report.check("SIGTERM: exit status 0", self._stopped)
        report.check("compose.keys.yml: keys are asked for", self._with_keys)
        report.check("volumes outlive containers", self._volume_kept)

    def _gpu_configuration(self) -> str:
        failed = self.tools.start(self._program, *_GPU, "config", extra=self._settings)
        expect("name a model in .env" in failed.stderr + failed.stdout, "MODEL is not asked for")
        merged = self.run(*_GPU, "config", MODEL="org/model")
        for wanted in ("himap-vllm:gpu", "target: gpu", "MODEL: org/model", "driver: nvidia"):
            expect(wanted in merged, f"`{wanted}` is missing")
        return "valid, asks for MODEL, names an NVIDIA device; not started"

    def _up(self) -> str:
        self.run("up", "-d", "--no-build", "gateway", "prometheus")
        seconds = client.ready(_URL, lambda: self._state()["Running"])
        self.tools.podman("exec", _GATEWAY, "touch", _MARK)
        return f"ready in {seconds:.0f} s"

    def _ask(self) -> str:
        return client.ask(_URL, self.tools.root / "examples" / "scene.png")

    def _health(self) -> str:
        for name in (_GATEWAY, _PROMETHEUS):
            self.tools.podman("healthcheck", "run", name)
        return "healthy; run by hand, podman has systemd run them"

    def _hardened(self) -> str:
        process = Path(f"/proc/{self._state()['Pid']}/status").read_text()
        wanted = {"Uid": "10001", "CapPrm": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}
        for field, value in wanted.items():
            found = re.search(rf"^{field}:\s+(\S+)", process, re.M)
            expect(found is not None and found[1] == value, f"{field} is not {value}")
        for path, writable in (("/etc/x", False), ("/opt/himap/x", False), ("/tmp/x", True)):
            done = self.tools.start("podman", "exec", _GATEWAY, "touch", path)
            expect((done.returncode == 0) == writable, f"{path}: {done.stderr.strip()}")
        expect(self.tools.inspect(_GATEWAY)["HostConfig"]["ReadonlyRootfs"], "root is writable")
        return "10001, none, nothing but /tmp and the volume can be written"

    def _limits(self) -> str:
        limits = self.tools.inspect(_GATEWAY)["HostConfig"]
        expect(limits["Memory"] == 8 << 30, f"memory {limits['Memory']}")
        expect(limits["PidsLimit"] == 1024, f"pids {limits['PidsLimit']}")
        free = self.tools.podman("exec", _GATEWAY, "df", "-m", "--output=size", "/dev/shm")
        expect(free.split()[-1] == "1024", f"/dev/shm has {free.split()[-1]} MiB")
        return "8 GiB, 1024 processes, /dev/shm of 1 GiB"

    def _prometheus(self) -> str:
        seconds = client.wait_until(
            lambda: not self._unhealthy(), "target up, all rules evaluated", _SCRAPED_SECONDS
        )
        return f"after {seconds:.0f} s target up, {len(self._rules())} rules healthy"

    def _unhealthy(self) -> list[str]:
        targets = client.prometheus(_PROMETHEUS_URL, "targets")["activeTargets"]
        down = [t["scrapeUrl"] for t in targets if t["health"] != "up"]
        wrong = [rule["name"] for rule in self._rules() if rule["health"] != "ok"]
        return [*down, *wrong] if len(targets) == 2 and self._rules() else ["nothing loaded"]

    def _rules(self) -> list[dict[str, Any]]:
        groups = client.prometheus(_PROMETHEUS_URL, "rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _killed(self) -> str:
        before = self._state()["Pid"]
        os.kill(_engine_core(before), signal.SIGKILL)
        client.wait_until(lambda: client.status(f"{_URL}/health/ready")[0] != 200, "not ready", 30)
        seconds = client.ready(_URL)
        expect(self._state()["Pid"] != before, "the container did not restart")
        return f"ready again in {seconds:.0f} s, {self._ask()}"

    def _stopped(self) -> str:
        started = time.monotonic()
        self.run("stop", "gateway")
        code = self._state()["ExitCode"]
        expect(code == 0, f"status {code}")
        return f"in {time.monotonic() - started:.0f} s"

    def _with_keys(self) -> str:
        printed = self.run("run", "--rm", "--no-deps", "-T", "gateway", "himap", "key", "team-a")
        key = re.search(r"shown only now: (\S+)", printed)
        expect(key is not None, f"no key in {printed!r}")
        assert key is not None
        self._keys.mkdir(exist_ok=True)
        entry = printed[printed.index("below `keys:`") :].split("\n", 1)[1]
        (self._keys / "keys.yaml").write_text(f"keys:\n{entry}")
        self.run(*_KEYS, "up", "-d", "--no-build", "--force-recreate", "--no-deps", "gateway")
        client.ready(_URL, lambda: self._state()["Running"])
        code = client.status(f"{_URL}/v1/models")[0]
        expect(code == 401, f"status {code} without a key")
        said = client.ask(_URL, self.tools.root / "examples" / "scene.png", key[1])
        return f"401 without a key; with it {said}"

    def _volume_kept(self) -> str:
        self.tools.podman("exec", _GATEWAY, "test", "-e", _MARK)
        return "a file that the first gateway wrote is there for the third"

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.tools.inspect(_GATEWAY)["State"]
        return state


def _engine_core(process: int) -> int:
    """Process id of vLLM's engine core among the descendants of a process."""
    pending = [process]
    while pending:
        found = pending.pop()
        if Path(f"/proc/{found}/cmdline").read_bytes().startswith(b"VLLM::EngineCore"):
            return found
        for task in Path(f"/proc/{found}/task").iterdir():
            pending += map(int, (task / "children").read_text().split())
    raise OSError("the container has no engine core")
