# SPDX-License-Identifier: Apache-2.0
"""The whole test suite: `python -m tests [--without ROOM] [--isa ISA] [OPTIONS OF PYTEST]`.

Installs the programs that tests run, then runs pytest twice: once for all rooms but `interpreted`,
and once for that one, as Triton's interpreter is chosen when Triton is imported. A worker that dies
is one failed test, and another takes its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from himap_server.memory import available_memory

from tests import programs

# In the order in which they run: short tests last, so that no worker is left alone for long.
ROOMS = ("ops", "engine", "gateway", "unit", "interpreted")
_CORES = 2  # more do not help: tests of a file share a worker
_GIGABYTES_A_WORKER = 6  # its engines, and a server beside them
# Environment that narrows torch and oneDNN like tests/narrowed does vLLM.
NARROWED = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
_NO_TESTS = 5  # pytest's exit status where options such as -k left none


def workers(rooms: Sequence[str]) -> int:
    """One a core, and one more that works while servers start and stop, if there is memory."""
    cores = min(_CORES, len(os.sched_getaffinity(0)))
    waits = "gateway" in rooms and available_memory() > (cores + 1) * (_GIGABYTES_A_WORKER << 30)
    return cores + waits


def run(rooms: Sequence[str], options: Sequence[str], **environment: str) -> int:
    """Exit status of pytest on these rooms; 0 without any."""
    if not rooms:
        return 0
    command = [sys.executable, "-m", "pytest", "-n", str(workers(rooms))]
    # In their order: files of a room share a server, for as long as the room's tests go on.
    command += ["--dist", "loadgroup", "--no-loadscope-reorder", *options]
    command += [str(programs.ROOT / "tests" / room) for room in rooms]
    print(f"Testing {', '.join(rooms)}.", flush=True)
    done = subprocess.run(command, cwd=programs.ROOT, env={**os.environ, **environment})
    return done.returncode


def main(arguments: Sequence[str]) -> int:
    """Exit status of the command line."""
    parser = argparse.ArgumentParser("python -m tests", description="Runs the whole test suite.")
    parser.add_argument("--without", action="append", choices=ROOMS, default=[], metavar="ROOM")
    parser.add_argument("--isa", choices=NARROWED, help="tests/narrowed: act as a lesser processor")
    chosen, options = parser.parse_known_args(arguments)
    rooms = [room for room in ROOMS if room not in chosen.without]
    if (complaint := programs.install(rooms)) is not None:
        print(complaint, file=sys.stderr)
        return 2
    if chosen.isa is not None:
        path = [str(programs.ROOT / "tests" / "narrowed"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        os.environ |= {"HIMAP_TEST_ISA": chosen.isa, **NARROWED[chosen.isa]}
    here = [room for room in rooms if room != "interpreted"]
    interpreted = [room for room in rooms if room == "interpreted"]
    statuses = {run(here, options), run(interpreted, options, TRITON_INTERPRET="1")}
    return max(statuses - {_NO_TESTS}, default=_NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
