# SPDX-License-Identifier: Apache-2.0
"""Order of the work, command line, exit status."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from . import images, machine
from .commands import check_commands
from .compose import Compose
from .report import Report
from .tools import Tools, VerificationError

_EPILOG = """\
Exit status: 0 all checks passed, 1 a check failed, 2 this machine cannot run them.

What stands in for what: buildah and podman for Docker, podman-compose for docker compose, Debian's
packages for the images python and prom/prometheus. Grafana, Alertmanager and the gpu image are not
started."""
_STAND_INS = (
    "buildah and podman stand in for Docker, podman-compose for docker compose,"
    " Debian's packages for the base images"
)


def main() -> int:
    """Run everything; returns the exit status."""
    parser = ArgumentParser(prog="docker/verify", description=__doc__, epilog=_EPILOG)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--install", action="store_true", help="install missing Debian packages")
    parser.add_argument(
        "--work",
        type=Path,
        default=cache / "himap-verify",
        help="images, layers, logs (%(default)s)",
    )
    parser.add_argument("--forget", action="store_true", help="delete that folder in the end")
    options = parser.parse_args()
    try:
        machine.require(options.install)
    except machine.UnsuitableError as error:
        print(f"docker/verify: {error}", file=sys.stderr)
        return 2
    tools = Tools(Path(__file__).parents[2], options.work.resolve())
    report = Report()
    try:
        return _verify(tools, report)
    finally:
        if options.forget:
            tools.forget()


def _verify(tools: Tools, report: Report) -> int:
    print(f"{_STAND_INS}; all of it in {tools.work}", flush=True)
    try:
        report.step("python", lambda: images.make_python(tools))
        report.step("prometheus", lambda: images.make_prometheus(tools))
        report.step("Dockerfile, target cpu", lambda: images.build(tools))
        compose = Compose(tools)
    except VerificationError as error:
        print(f"FAIL {error}", flush=True)
        return 1
    compose.down()  # what an interrupted run left
    try:
        compose.check(report)
    finally:
        compose.down()
    check_commands(tools, report)
    print(f"{report.passed} checks passed, {report.failed} failed", flush=True)
    return int(report.failed > 0)
