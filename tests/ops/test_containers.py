# SPDX-License-Identifier: Apache-2.0
"""The image's files and the compose files, as far as they can be checked without an engine.

No image is built here. What the image would run is run: its entry point, as an unprivileged user,
with every file system read-only but the two that a container gets, health check and stop included.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.gateway.support import post
from tests.ops.conftest import ROOT, program
from tests.servers import Server, picture_message

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = ("docker-compose.yml", "docker/compose.gpu.yml", "docker/compose.keys.yml")
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
# The user of the image; may read the checkout, wherever it lies, and nothing more.
_UNPRIVILEGED = (
    "setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups", "--no-new-privs",
    "--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search",
)  # fmt: skip
_READ_ONLY = """
mount --make-rprivate /
mount -o remount,bind,ro /
mount -t tmpfs -o mode=0700,uid=10001,gid=10001,noexec,nosuid,nodev none "$1"
mount -t tmpfs -o mode=0700,uid=10001,gid=10001 none "$2"
shift 2
exec "$@"
"""


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of the project's dev extra."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def compose(name: str) -> dict[str, Any]:
    """A compose file, variables as they are in .env.example."""
    defaults = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )

    def substitute(match: re.Match[str]) -> str:
        variable, kind, text = match.groups()
        if value := defaults[variable]:
            return value
        return {"-": text, "?": "given", None: ""}[kind]

    source: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(substitute, (ROOT / name).read_text()))
    return source


def images() -> list[str]:
    """All images that are pulled."""
    stages = set(re.findall(r" AS (\S+)", DOCKERFILE))
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)) - stages
    services = compose("docker-compose.yml")["services"].values()
    return sorted(bases | {s["image"] for s in services if "build" not in s})


def test_hadolint_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    done = tool("hadolint", "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\n")
    assert "DL3006" in tool("hadolint", str(tmp_path / "Dockerfile")).stdout


def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path) for path in (ROOT / "docker").glob("*.sh")]
    assert scripts
    done = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_schema(name: str, tmp_path: Path) -> None:
    source = compose(name)
    check = ("--builtin-schema", "vendor.compose-spec", str(tmp_path / "compose.json"))
    (tmp_path / "compose.json").write_text(json.dumps(source))
    done = tool("check-jsonschema", *check)
    assert done.returncode == 0, done.stdout
    source["services"]["gateway"]["prots"] = ["80:80"]
    (tmp_path / "compose.json").write_text(json.dumps(source))
    assert tool("check-jsonschema", *check).returncode == 1


def test_images_are_pinned() -> None:
    found = images()
    assert len(found) == 6
    for image in found:
        assert re.search(r":v?\d+\.\d+\.\d+[\w.-]*$", image), image


def test_every_variable_is_explained() -> None:
    known = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.M))
    used = {m[0] for name in COMPOSE for m in _VARIABLE.findall((ROOT / name).read_text())}
    assert used == known


def test_services() -> None:
    source = compose("docker-compose.yml")
    for name, service in source["services"].items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["mem_limit"]
        assert "cpus" in service
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:") == (name != "gateway")
        for volume in service["volumes"]:
            origin = volume.split(":")[0]
            if origin.startswith("."):
                assert (ROOT / origin).exists(), volume
                assert volume.endswith(":ro")
            else:
                assert origin in source["volumes"]
        # The gateway's is in the image.
        assert ("healthcheck" in service) == (name != "gateway")
        for other, wait in service.get("depends_on", {}).items():
            assert other in source["services"]
            assert wait["condition"] in {"service_healthy", "service_started"}
    gateway = source["services"]["gateway"]
    grace = int(gateway["environment"]["HIMAP_GRACE_SECONDS"])
    assert int(gateway["stop_grace_period"].removesuffix("s")) > grace


def test_the_quickstart_lists_what_starts() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text()
    source = compose("docker-compose.yml")
    for name, service in source["services"].items():
        assert re.search(rf"^\| {name}\b", text, re.IGNORECASE | re.MULTILINE)
        for port in service["ports"]:
            assert port.rsplit(":", 1)[0] in text
    for volume in source["volumes"]:
        assert f"`{volume}`" in text


def test_compose_names_what_the_configurations_name() -> None:
    services = compose("docker-compose.yml")["services"]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["gateway:8000"]}]
    (alertmanagers,) = prometheus["alerting"]["alertmanagers"]
    assert alertmanagers["dns_sd_configs"][0]["names"] == ["alertmanager"]
    assert {"gateway", "alertmanager"} <= set(services)
    provisioning = ROOT / "deploy/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards/himap.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/json:{path}:ro" in services["grafana"]["volumes"]


def test_alertmanagers_configuration() -> None:
    file = str(ROOT / "deploy/alertmanager/alertmanager.yml")
    done = subprocess.run([program("amtool"), "check-config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    }
    copied = set()
    for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M):
        copied |= set(words.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({"MODEL": "a/b"}, [], "serve a/b --host 0.0.0.0 --port 8000"),
        ({"MODEL": "a/b"}, ["c/d", "--seed", "1"], "serve c/d --host 0.0.0.0 --port 8000 --seed 1"),
        (
            {"MODEL": "a/b", "SERVE_FLAGS": "--seed 1  --x *"},
            ["--seed", "2"],
            "serve a/b --host 0.0.0.0 --port 8000 --seed 1 --x * --seed 2",
        ),
        (
            {},
            ["--seed", "1"],
            "serve --host 0.0.0.0 --port 8000"
            " --kv-cache-memory-bytes 256M --enforce-eager --seed 1",
        ),
        ({}, ["himap", "key", "team a"], "key team a"),
    ],
)
def test_entrypoints_arguments(
    tmp_path: Path, environment: dict[str, str], arguments: list[str], expected: str
) -> None:
    (tmp_path / "himap").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "himap").chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "docker" / "entrypoint.sh"), *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Addresses of sockets have at most 107 characters; pytest's own folders take most of them."""
    with tempfile.TemporaryDirectory(prefix="himap-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_entry_point_runs_unprivileged_on_a_read_only_system(short_path: Path) -> None:
    """The cpu image's, with its environment and user, until ready; then the way it is stopped."""
    stage = DOCKERFILE[DOCKERFILE.index(" AS cpu\n") :]
    assert "USER 10001:10001" in stage
    image = dict(re.findall(r"(\w+)=(\S+)", stage[stage.index("ENV ") : stage.index("USER")]))
    image.pop("PATH")
    temporary, cache = short_path / "tmp", short_path / "cache"
    for folder in (temporary, cache):
        folder.mkdir()
    places = {"/var/cache/himap": cache, "/tmp": temporary}
    environment = {name: _moved(value, places) for name, value in image.items()}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not the image's address: the tests stay on loopback.
    flags = ("--host", "127.0.0.1", "--port", str(port))
    entrypoint = str(ROOT / "docker" / "entrypoint.sh")
    command = [
        *("unshare", "--mount", "sh", "-euc", _READ_ONLY, "sh", str(temporary), str(cache)),
        *(*_UNPRIVILEGED, entrypoint, *flags),
    ]
    process = subprocess.Popen(command, env=environment, cwd="/")
    try:
        server = Server(process, f"http://127.0.0.1:{port}")
        server.wait_for("/health/live", 120)
        assert health_check(port) == 1, "not ready while it loads"
        server.wait_for("/health/ready")
        assert health_check(port) == 0
        assert question(server) == "cyan"
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+10001\s+10001", status, re.M)
        mounts = Path(f"/proc/{process.pid}/mounts").read_text()
        assert re.search(r"^\S+ / \S+ ro,", mounts, re.M)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_small_dev_shm_is_refused_with_the_flag_that_mends_it() -> None:
    """What `docker run` without `--shm-size` gives: 64 MB."""
    script = 'mount --make-rprivate / && mount -t tmpfs -o size=64m none /dev/shm && exec "$@"'
    entrypoint = str(ROOT / "docker" / "entrypoint.sh")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", script, "sh", entrypoint, "--port", "0"],
        # HOME has vLLM's notes on model classes; without them another process imports vLLM.
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(Path.home()),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if "--shm-size" in line)
    assert json.loads(line)["message"].startswith(
        "the engine did not start: /dev/shm has 64 MiB free, the engine's queues need 400 MiB"
    )


def test_verify_says_what_it_lacks() -> None:
    done = subprocess.run(
        [*_UNPRIVILEGED, sys.executable, str(ROOT / "docker" / "verify")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("docker/verify: root is needed")


def question(server: Server) -> str:
    """What the bundled model says of the picture in README.md."""
    with Image.open(ROOT / "examples" / "scene.png") as image:
        message = picture_message(image, "What color is the star?")
    body = {"model": "himap-demo", "messages": [message], "max_tokens": 8, "temperature": 0}
    status, _, answer = post(server, "/v1/chat/completions", body)
    assert status == 200
    assert answer["usage"]["himap"]["kept_deep"] == 41
    return str(answer["choices"][0]["message"]["content"]).strip()


def _moved(value: str, places: dict[str, Path]) -> str:
    for place, new in places.items():
        if value == place or value.startswith(f"{place}/"):
            return str(new) + value.removeprefix(place)
    return value


def health_check(port: int) -> int:
    """Exit status of the image's health check, of this port."""
    checks = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD (\[.+\])$", DOCKERFILE, re.M)
    assert len(checks) == 2
    assert len(set(checks)) == 1
    assert "/health/ready" in checks[0]
    command = json.loads(checks[0].replace(":8000/", f":{port}/"))
    assert str(port) in command[-1]
    return subprocess.run([sys.executable, *command[1:]], capture_output=True).returncode
