# SPDX-License-Identifier: Apache-2.0
"""podman, buildah and podman-compose with storage and settings of their own, in one folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

PODMAN_COMPOSE = "podman-compose==1.6.0"
PROJECT = "himap-verify"

# tmp_dir, lock_type: apart from other containers of this machine.
# runc: Debian's crun refuses machines with both cgroup versions mounted. cgroupfs, file: no systemd
# is asked. Limits: podman's own may lie above what the machine allows it.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{work}/run/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{work}/networks"
"""
_STORAGE_CONF = """
[storage]
driver = "{driver}"
graphroot = "{work}/storage"
runroot = "{work}/run"
"""
# Names without a registry mean Docker Hub, as they do for Docker.
_REGISTRIES_CONF = 'unqualified-search-registries = ["docker.io"]\n'


_LIMIT = 32768


class VerificationError(Exception):
    """A command ended with an error, or a check found something wrong."""


class Tools:
    """The programs, bound to the folder `work`.

    Attributes:
        root: the project's folder, where commands run.
        work: images, layers, networks and logs. Nothing outside it is changed.
    """

    def __init__(self, root: Path, work: Path) -> None:
        self.root = root
        self.work = work
        for folder in ("networks", "tmp", "logs"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        values = {
            "work": work,
            "driver": os.environ.get("STORAGE_DRIVER", "overlay"),
            "files": _limit(resource.RLIMIT_NOFILE),
            "processes": _limit(resource.RLIMIT_NPROC),
        }
        self._environment = {**os.environ, "TMPDIR": str(work / "tmp")}
        for variable, name, text in (
            ("CONTAINERS_CONF", "containers.conf", _CONTAINERS_CONF.format(**values)),
            ("CONTAINERS_STORAGE_CONF", "storage.conf", _STORAGE_CONF.format(**values)),
            ("CONTAINERS_REGISTRIES_CONF", "registries.conf", _REGISTRIES_CONF),
        ):
            (work / name).write_text(text)
            self._environment[variable] = str(work / name)

    def run(
        self, *command: str, extra: Mapping[str, str] | None = None, timeout: float = 900
    ) -> str:
        """Run to the end; returns what it printed on stdout.

        Raises:
            VerificationError: it ended with another status than 0, or not in time (seconds).
        """
        done = self.start(*command, extra=extra, timeout=timeout)
        if done.returncode != 0:
            raise VerificationError(
                f"{' '.join(command)}: status {done.returncode}\n{_tail(done.stderr)}"
            )
        return done.stdout

    def start(
        self, *command: str, extra: Mapping[str, str] | None = None, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """As `run`, whatever the exit status is."""
        try:
            return subprocess.run(
                command,
                cwd=self.root,
                env={**self._environment, **(extra or {})},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise VerificationError(f"{' '.join(command)}: not done in {timeout:.0f} s") from error

    def log(self, name: str, *command: str, timeout: float = 2400) -> None:
        """As `run`, for long commands: the output goes to `logs/NAME.log`."""
        path = self.work / "logs" / f"{name}.log"
        with path.open("w") as log:
            try:
                done = subprocess.run(
                    command,
                    cwd=self.root,
                    env=self._environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired as error:
                raise VerificationError(
                    f"{name}: not done in {timeout:.0f} s, see {path}"
                ) from error
        if done.returncode != 0:
            raise VerificationError(
                f"{name}: status {done.returncode}, see {path}\n{_tail(path.read_text())}"
            )

    def popen(self, *command: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start, with the output in `log`."""
        return subprocess.Popen(
            command, cwd=self.root, env=self._environment, stdout=log, stderr=subprocess.STDOUT
        )

    def podman(self, *arguments: str, timeout: float = 900) -> str:
        """`podman ARGUMENTS`."""
        return self.run("podman", *arguments, timeout=timeout)

    def has_image(self, name: str) -> bool:
        """Whether the storage has it."""
        return self.start("podman", "image", "exists", name).returncode == 0

    def inspect(self, name: str) -> Any:
        """A container, as `podman inspect` shows it."""
        return json.loads(self.podman("container", "inspect", name))[0]

    def compose_program(self) -> str:
        """podman-compose, in a virtual environment of its own."""
        program = self.work / "compose" / "bin" / "podman-compose"
        if not program.exists():
            self.run(sys.executable, "-m", "venv", "--clear", str(program.parents[1]))
            self.run(str(program.with_name("pip")), "install", "--quiet", PODMAN_COMPOSE)
        return str(program)

    def forget(self) -> None:
        """Delete the images, the layers and the logs."""
        self.start("umount", "--lazy", str(self.work / "storage" / "overlay"))
        shutil.rmtree(self.work, ignore_errors=True)


def _limit(kind: int) -> int:
    """Half of what this process may have: what runs containers may not raise it, or use all."""
    hard = resource.getrlimit(kind)[1]
    return _LIMIT if hard == resource.RLIM_INFINITY else min(_LIMIT, hard // 2)


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])
