# SPDX-License-Identifier: Apache-2.0
"""Turns the bundle of `bench.gpu.pack` into a virtual environment: `python3 unpack.py ENV`.

Run it with the Python that has PyTorch, which may itself be of a virtual environment: the new one
sees that one's packages behind its own. Needs no network and nothing but Python and pip. Later,
`--project` brings another state of this project into the environment.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAME = "himap-gpu.tar.xz"
PROJECT = "himap-project.tar.xz"
CHECK = """
import importlib.metadata as metadata, os, sys, torch
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # as the benchmark has it
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)
names = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
assert "himap" in names, names
import vllm
from vllm.platforms import current_platform
print("vllm", vllm.__version__, "on", type(current_platform).__name__)
import vllm.entrypoints.llm, vllm.v1.engine.async_llm
import himap_vllm.plugin, bench.gpu.engine
if current_platform.is_cuda():
    import vllm.v1.worker.gpu.model_runner, himap_vllm.runner.v2
    from vllm.vllm_flash_attn.flash_attn_interface import FA3_AVAILABLE, FA3_UNAVAILABLE_REASON
    assert FA3_AVAILABLE, FA3_UNAVAILABLE_REASON
# Asked when the sampler is built, which no import does; would import FlashInfer without the above.
from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported
assert not flashinfer_sampler_supported()
print("imports are fine")
"""


class Chain(io.RawIOBase):
    """Files one after the other, as one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._chunks = self._read(files)

    @staticmethod
    def _read(files: Sequence[Path]) -> Iterator[bytes]:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = getattr(self, "_left", b"") or next(self._chunks, b"")
        count = min(len(buffer), len(chunk))
        buffer[:count] = chunk[:count]
        self._left = chunk[count:]
        return count


def check_sums(files: Sequence[Path], sums: Path) -> None:
    """Compare files with the list made beside them.

    Raises:
        SystemExit: one is damaged, or a listed one is not among them.
    """
    wanted = {name: digest for digest, name in (n.split() for n in sums.read_text().splitlines())}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    bad = [name for name in wanted if found.get(name) != wanted[name]]
    if bad:
        raise SystemExit(f"missing or damaged: {', '.join(bad)}")


def make_environment(env: Path) -> None:
    """An environment over the base interpreter that sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run(
        [str(env / "bin" / "python"), "-c", ask], check=True, stdout=subprocess.PIPE, text=True
    )
    site = Path(answer.stdout.strip())
    parents = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({parent!r})\n" for parent in parents]
    (site / "zz_parent.pth").write_text("".join(lines))
    (site / "zz_source.pth").write_text(f"{(env / 'source').resolve()}\n")


def install(files: Sequence[Path], env: Path) -> None:
    """Unpack an archive, which may be in parts, and install the wheels in it."""
    with (
        io.BufferedReader(Chain(files), 1 << 20) as stream,
        tarfile.open(fileobj=stream, mode="r|xz") as archive,
    ):
        archive.extractall(env, filter="data")
    wheels = sorted((env / "wheels").glob("*.whl"))
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--quiet", "--python", str(env / "bin" / "python"),
            "install", "--no-index", "--no-deps", "--no-compile", "--ignore-installed",
            *map(str, wheels),
        ],
        check=True,
    )  # fmt: skip
    for wheel in wheels:
        wheel.unlink()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", type=Path, help="the environment to make")
    parser.add_argument("--parts", type=Path, default=Path(__file__).parent, help="their folder")
    parser.add_argument("--no-check", action="store_true", help="don't try the imports")
    parser.add_argument("--project", action="store_true", help="only this project, again")
    args = parser.parse_args()
    parts = sorted(args.parts.glob(f"{NAME}.*"))
    project = args.parts / PROJECT
    if not args.project:
        check_sums([*parts, project], args.parts / "SHA256SUMS")
        make_environment(args.env)
        install(parts, args.env)
    install([project], args.env)
    if not args.no_check:
        subprocess.run([str(args.env / "bin" / "python"), "-c", CHECK], check=True)
    print(f"done: {args.env}/bin/python -m bench.gpu")


if __name__ == "__main__":
    main()
