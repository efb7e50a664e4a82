# SPDX-License-Identifier: Apache-2.0
"""What the machine must have: root, Debian 12, and the programs that stand in for Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# Program or file, and the Debian package that has it.
_NEEDED = {
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "conmon": "conmon",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
}
_APT = ("apt-get", "install", "-y", "--no-install-recommends")
# Root's, which not every root has in its PATH.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class UnsuitableError(Exception):
    """This machine cannot run the checks; says what is missing."""


def require(install: bool) -> None:
    """Check the machine; with `install`, install the packages that are missing.

    Raises:
        UnsuitableError: not root, not Debian, or programs are missing.
    """
    if os.geteuid() != 0:
        raise UnsuitableError("root is needed: debootstrap, mounts and container networks")
    if not Path("/etc/debian_version").exists():
        raise UnsuitableError(
            "Debian is needed: what replaces the base images comes from its packages"
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    packages = _missing()
    if packages and install:
        print(f"installing {' '.join(packages)}", flush=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (("apt-get", "update"), (*_APT, *packages)):
            done = subprocess.run(command, env=quiet, capture_output=True, text=True)
            if done.returncode != 0:
                raise UnsuitableError(f"{' '.join(command)}: {done.stderr.strip()}")
        packages = _missing()
    if packages:
        raise UnsuitableError(
            f"programs are missing; --install runs `{' '.join([*_APT, *packages])}`"
        )


def _missing() -> list[str]:
    return [package for program, package in _NEEDED.items() if shutil.which(program) is None]
