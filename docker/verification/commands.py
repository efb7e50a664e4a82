# SPDX-License-Identifier: Apache-2.0
"""The `docker run` commands of docs/operations.md as they are written there, run by podman."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import client
from .report import Report, expect
from .tools import PROJECT, Tools, VerificationError

_NAME = f"{PROJECT}-run"
_URL = "http://127.0.0.1:8000"
# For the placeholder `org/model`: no model is downloaded here.
_MODEL = "/opt/himap/lib/python3.11/site-packages/himap_demo/model"
_STOP_SECONDS = 60.0


def documented(root: Path) -> list[str]:
    """The commands, without comments."""
    text = (root / "docs" / "operations.md").read_text()
    return [line.strip() for line in re.findall(r"^\s*(docker run [^#\n]*)", text, re.M)]


def check_commands(tools: Tools, report: Report) -> None:
    """One check per command, and one of the first without its `--shm-size`."""
    commands = documented(tools.root)
    serving = [command for command in commands if " -p 8000:8000 " in command]
    for command in commands:
        look = _serve if command in serving else _show_key
        report.check(command, partial(look, tools, command))
    bare = re.sub(r" --shm-size \S+", "", serving[0])
    report.check(f"{bare}, refused", lambda: _refused(tools, bare))


def _serve(tools: Tools, command: str) -> str:
    name, served = "himap-demo", command
    if " org/model" in command:
        served = command.replace("org/model", f"{_MODEL} --served-model-name {name}")
    with _started(tools, served) as process:
        seconds = client.ready(_URL, lambda: process.poll() is None)
        said = client.ask(_URL, tools.root / "examples" / "scene.png")
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_SECONDS)
    expect(code == 0, f"status {code} after SIGTERM")
    model = ", org/model is the bundled model's folder" if served != command else ""
    return f"ready in {seconds:.0f} s, {said}, SIGTERM gives status 0{model}"


def _show_key(tools: Tools, command: str) -> str:
    with _started(tools, command) as process:
        code = process.wait(_STOP_SECONDS)
    expect(code == 0, f"status {code}")
    expect("The key, shown only now" in _log(tools).read_text(), "no key was printed")
    return "a key and its entry are printed"


def _refused(tools: Tools, command: str) -> str:
    with _started(tools, command) as process:
        code = process.wait(client.LOADING_SECONDS)
    said = _log(tools).read_text()
    expect(code == 1, f"status {code}, not 1")
    expect("--shm-size 1g" in said, "the flag is not named")
    return "status 1, and the message names the flag"


@contextmanager
def _started(tools: Tools, command: str) -> Iterator[subprocess.Popen[bytes]]:
    words = shlex.split(command)
    with _log(tools).open("wb") as log:
        process = tools.popen("podman", "run", "--name", _NAME, *words[2:], log=log)
        try:
            yield process
        except subprocess.TimeoutExpired as error:
            raise VerificationError(f"still running after {error.timeout:.0f} s") from error
        finally:
            tools.start("podman", "rm", "--force", "--time", "5", _NAME)
            process.wait()


def _log(tools: Tools) -> Path:
    return tools.work / "logs" / "run.log"
