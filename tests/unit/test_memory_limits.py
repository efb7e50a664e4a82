# SPDX-License-Identifier: Apache-2.0
"""Memory limits as Linux' cgroup file systems show them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from himap_server.memory import _left_in_cgroups, available_memory

MIB = 1 << 20
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, usage: int, cache: int) -> None:
    """One cgroup's memory files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def member(root: Path, *lines: str) -> None:
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_every_group_on_the_way_up_has_its_say(root: Path) -> None:
    """cgroup v2, a service within a slice; the root has no memory files."""
    member(root, "0::/app.slice/himap.service")
    folder = root / "sys/fs/cgroup/app.slice"
    group(folder, V2, str(3000 * MIB), 500 * MIB, 0)
    group(folder / "himap.service", V2, str(2000 * MIB), 700 * MIB, 200 * MIB)
    assert list(_left_in_cgroups(root)) == [1500 * MIB, 2500 * MIB]


def test_unlimited_groups_have_none(root: Path) -> None:
    member(root, "9:memory:/", "0::/")
    group(root / "sys/fs/cgroup/memory", V1, str((1 << 63) - 4096), 700 * MIB, 0)
    group(root / "sys/fs/cgroup", V2, "max", 700 * MIB, 0)
    assert list(_left_in_cgroups(root)) == []


def test_a_container_that_sees_the_path_of_the_host(root: Path) -> None:
    """cgroup v1 without a cgroup namespace: the container's own group is mounted as the root."""
    member(root, "5:cpu,cpuacct:/docker/1f0c", "4:memory:/docker/1f0c", "1:name=systemd:/")
    group(root / "sys/fs/cgroup/memory", V1, str(1000 * MIB), 100 * MIB, 0)
    assert list(_left_in_cgroups(root)) == [900 * MIB]


def test_a_group_over_its_limit_has_nothing_left(root: Path) -> None:
    member(root, "0::/")
    group(root / "sys/fs/cgroup", V2, str(100 * MIB), 130 * MIB, 0)
    assert list(_left_in_cgroups(root)) == [0]


def test_no_cgroups_at_all(root: Path) -> None:
    assert list(_left_in_cgroups(root)) == []


def test_never_more_than_the_machine_has() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
