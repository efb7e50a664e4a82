# SPDX-License-Identifier: Apache-2.0
"""How much memory this machine, and the container or service around us, has left.

vLLM's own `get_cgroup_memory_limit` knows only the topmost cgroup that the process can see, not the
limit of a service's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60  # of cgroup v1, which says PAGE_COUNTER_MAX


def available_memory() -> int:
    """Bytes that can still be used: of the machine's memory, and of every cgroup's around us."""
    return min([int(psutil.virtual_memory().available), *_left_in_cgroups(Path("/"))])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What each limit leaves: bytes, page cache that can be dropped not taken as used.

    Args:
        root: what holds `proc` and `sys`.
    """
    memberships = root / "proc/self/cgroup"
    if not memberships.exists():
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / mount / path.lstrip("/")
        # In a container without a cgroup namespace the path is the host's: then only the mount is.
        for folder in (inner, *inner.parents):
            if (root / mount) in (folder, *folder.parents):
                left = _left(folder, *names)
                if left is not None:
                    yield left


def _left(folder: Path, limit_name: str, usage_name: str, droppable: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such controller, not ours to read, or empty
    return max(0, int(limit) - usage + int(stat.get(droppable, 0)))
