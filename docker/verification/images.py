# SPDX-License-Identifier: Apache-2.0
"""Base images of Debian's packages, under the tags that the project's files name; the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .tools import Tools, VerificationError

IMAGE = "himap-vllm:cpu"
# dev: torch.compile includes Python.h, which the real image has.
_PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
_MIRROR = "http://deb.debian.org/debian"
# As in the real image: `python` and `pip` are there, and pip may install.
_AS_PYTHON = "ln -s /usr/bin/python3 /usr/local/bin/python; rm -f {marker} /var/cache/apt/*.bin"
_MARKER = "/usr/lib/python3.11/EXTERNALLY-MANAGED"
# What the real one is: nobody's, with busybox's wget for the health check.
_PROMETHEUS = """
FROM {base}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget \\
    && install -d -o nobody -g nogroup /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
"""


def python_tag(root: Path) -> str:
    """The Python image that the Dockerfile builds on."""
    return _only(r"^FROM (python:\S+)", root / "Dockerfile")


def prometheus_tag(root: Path) -> str:
    """The Prometheus image that compose starts."""
    return _only(r"^\s+image: (prom/prometheus:\S+)", root / "docker-compose.yml")


def make_python(tools: Tools) -> str:
    """Debian 12 with Debian's Python 3.11, for `python:3.11...-slim-bookworm`."""
    tag = f"docker.io/library/{python_tag(tools.root)}"
    if tools.has_image(tag):
        return f"{tag}, made before"
    tree = tools.work / "debian"
    shutil.rmtree(tree, ignore_errors=True)
    tools.log(
        "debootstrap", "debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm",
        str(tree), _MIRROR,
    )  # fmt: skip
    tools.run("chroot", str(tree), "sh", "-c", _AS_PYTHON.format(marker=_MARKER))
    shutil.rmtree(tree / "var" / "cache" / "apt" / "archives", ignore_errors=True)
    archive = tools.work / "debian.tar"
    tools.run("tar", "-C", str(tree), "-cf", str(archive), ".")
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    tools.podman("import", "--change", path, str(archive), tag)
    archive.unlink()
    shutil.rmtree(tree)
    return f"{tag} is Debian 12 with {tools.podman('run', '--rm', tag, 'python', '-V').strip()}"


def make_prometheus(tools: Tools) -> str:
    """Debian's Prometheus, for `prom/prometheus`."""
    tag = f"docker.io/{prometheus_tag(tools.root)}"
    file = tools.work / "Prometheus.Dockerfile"
    file.write_text(_PROMETHEUS.format(base=python_tag(tools.root)))
    context = tools.work / "empty"
    context.mkdir(exist_ok=True)
    _build(tools, "prometheus", "-t", tag, "-f", str(file), str(context))
    version = tools.podman("run", "--rm", tag, "--version").splitlines()[0]
    return f"{tag} is Debian's {' '.join(version.split()[:3])}"


def build(tools: Tools) -> str:
    """The Dockerfile's target `cpu`, as `himap-vllm:cpu`."""
    _build(tools, "build", *_pip_options(tools), "--target", "cpu", "-t", IMAGE, ".")
    size = int(tools.podman("image", "inspect", "-f", "{{.Size}}", IMAGE))
    return f"{IMAGE}, {size / 1e9:.1f} GB"


def _build(tools: Tools, name: str, *arguments: str) -> None:
    # Format docker: OCI's has no HEALTHCHECK.
    tools.log(
        name, "buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers",
        "--format", "docker", "--pull=never", *arguments,
    )  # fmt: skip


def _pip_options(tools: Tools) -> list[str]:
    """What pip is told on this machine, and the local files that it is told of, for the build.

    As one `/etc/pip.conf`, mounted and hence not part of the image.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^(global|:env:)\.([\w-]+)='(.*)'$", listed, re.M)
    # The environment wins over files, as it does for pip.
    settings = {
        name: value for origin, name, value in sorted(found, key=lambda f: f[0] != "global")
    }
    configuration = tools.work / "pip.conf"
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    configuration.write_text("\n".join(lines) + "\n")
    words = " ".join(settings.values()).split()
    paths = {path for word in words if (path := _local(word)) is not None}
    options = ["--volume", f"{configuration}:/etc/pip.conf:ro"]
    for path in sorted(paths):
        options += ["--volume", f"{path}:{path}:ro"]
    if index := os.environ.get("PIP_EXTRA_INDEX_URL"):
        options += ["--build-arg", f"PIP_EXTRA_INDEX_URL={index}"]
    return options


def _local(word: str) -> Path | None:
    """A file or folder on this machine; of an index the folder around, which has the files."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return None
    return path.parent if word.startswith("file://") else path


def _only(pattern: str, file: Path) -> str:
    found = set(re.findall(pattern, file.read_text(), re.M))
    if len(found) != 1:
        raise VerificationError(f"{file.name} names {len(found)} images of the form {pattern}")
    return str(found.pop())
