# SPDX-License-Identifier: Apache-2.0
"""Makes a bundle that runs `bench.gpu` on a bare machine: `python -m bench.gpu.pack FOLDER`.

For a machine with an NVIDIA driver for CUDA 13, Python 3.12, PyTorch 2.11 (cu130), Triton and
transformers, but neither vLLM nor a network, that is fed in transfers of limited size. Needs pip
and a package index; run it with Python 3.12, as pip evaluates environment markers for the Python
that it runs in.

In `himap-gpu.tar.xz.*`, kept if already there:

* vLLM's CUDA wheel without the kernels that this benchmark's model never calls (`LEFT_OUT`):
  its parts for other attention kinds, mixtures of experts, other GPUs. They are three quarters of
  it. Every import of what is missing is guarded in vLLM 0.32;
* wheels of what vLLM needs (its own list, without `UNNEEDED`), but for `PRESENT`.

In `himap-project.tar.xz`, small and made anew each time: this project's wheel and the sources of
the benchmark. Beside them `unpack.py`, for that machine, and `SHA256SUMS`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VLLM = "0.32.0"
CONSTRAINTS = ("torch==2.11.0", "transformers>=5.17,<5.18")  # what the machine has
PART_MIB = 45
NAME = "himap-gpu.tar.xz"
PROJECT = "himap-project.tar.xz"
SOURCES = ("bench", "tests/__init__.py", "tests/checkpoints.py", "LICENSE")

# Files of vLLM's wheel. What stays: _C_stable_libtorch, FlashAttention 3 (Hopper), and small ones.
LEFT_OUT = re.compile(
    r"vllm/(vllm_flash_attn/(_vllm_fa2_C|cute/)|third_party/(deep_gemm|fmha_sm100|tml_fa4)/"
    r"|_moe_C|_flashmla|_flashkda|_deepselect|_qutlass|vllm-rs)"
)
# What vLLM names as needed, but imports only for other models, other loaders, other media, or, as
# FlashInfer, for a sampler that the benchmark has switched off.
UNNEEDED = {
    "fastsafetensors", "flashinfer-python", "humming-kernels", "instanttensor",
    "numba", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvtx", "pynvvideocodec",
    "quack-kernels", "tilelang", "tokenspeed-mla", "torchaudio", "torchcodec", "torchvision",
}  # fmt: skip
# On the machine: by far the largest, or bound to its PyTorch.
PRESENT = {
    "hf-xet", "huggingface-hub", "numpy", "opencv-python-headless", "pillow", "safetensors",
    "sentencepiece", "setuptools", "sympy", "tokenizers", "torch", "transformers", "triton",
}  # fmt: skip
_PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)))
_TARGET = [
    "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
    *(f"--abi={abi}" for abi in ("cp312", "abi3", "none")),
    *(f"--platform={platform}" for platform in _PLATFORMS),
]  # fmt: skip


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    """Run pip quietly; its warnings stay visible."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def download(requirements: Sequence[str], folder: Path) -> None:
    """Wheels for the machine, without what they depend on."""
    pip("download", "--no-deps", *_TARGET, "--dest", str(folder), *requirements)


def direct_requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without extras and without `UNNEEDED` and PyTorch."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    wanted = []
    for requirement in metadata.get_all("Requires-Dist", []):
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None
        if "extra ==" not in requirement and canonical(match[0]) not in {*UNNEEDED, "torch"}:
            wanted.append(requirement)
    return wanted


def closure(requirements: Sequence[str]) -> list[str]:
    """`name==version` of everything that `requirements` come to on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text("\n".join(CONSTRAINTS))
        pip(
            "install", "--dry-run", "--ignore-installed", *_TARGET, "--target", folder,
            "--constraint", str(constraints), "--report", str(report), *requirements,
        )  # fmt: skip
        installs = json.loads(report.read_text())["install"]
    found = {canonical(i["metadata"]["name"]): i["metadata"]["version"] for i in installs}
    return [
        f"{name}=={version}"
        for name, version in sorted(found.items())
        if name not in PRESENT | UNNEEDED and not name.startswith(("nvidia-", "cuda-"))
    ]


def repack(wheel: Path, folder: Path) -> int:
    """Write a wheel without `LEFT_OUT`, uncompressed (the bundle's xz does better); its bytes."""
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_STORED) as target,
    ):
        for info in source.infolist():
            if LEFT_OUT.match(info.filename):
                continue
            content = source.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                content = _record(content)
            plain = zipfile.ZipInfo(info.filename, info.date_time)
            plain.external_attr = info.external_attr
            target.writestr(plain, content)
    return (folder / wheel.name).stat().st_size


def _record(content: bytes) -> bytes:
    lines = csv.reader(io.StringIO(content.decode()))
    kept = io.StringIO()
    csv.writer(kept, lineterminator="\n").writerows(n for n in lines if not LEFT_OUT.match(n[0]))
    return kept.getvalue().encode()


class Parts(io.RawIOBase):
    """A stream of bytes as files of at most `size` bytes: `path.00`, `path.01` and so on."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self.files: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        while left:
            room = self._size - self.files[-1].stat().st_size if self.files else 0
            if not room:
                self.files.append(self._path.with_name(f"{self._path.name}.{len(self.files):02}"))
                self.files[-1].unlink(missing_ok=True)
                room = self._size
            with self.files[-1].open("ab") as part:
                part.write(left[:room])
            left = left[room:]
        return len(data)


def pack_vllm(folder: Path, part_bytes: int) -> None:
    """Make the large part of the bundle; downloads are kept there for the next time."""
    downloads = folder / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    vllm = next(downloads.glob(f"vllm-{VLLM}-*.whl"), None)
    if vllm is None:
        say(f"downloading vLLM {VLLM}")
        download([f"vllm=={VLLM}"], downloads)
        vllm = next(downloads.glob(f"vllm-{VLLM}-*.whl"))
    say("resolving what it needs")
    pins = closure(direct_requirements(vllm))
    say(f"downloading {len(pins)} wheels: {' '.join(pins)}")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        wheels, fetched = Path(work, "wheels"), Path(work, "fetched")
        wheels.mkdir()
        download([*pins, "--find-links", str(downloads)], fetched)
        for wheel in [vllm, *sorted(fetched.iterdir())]:
            size = repack(wheel, wheels)
            if size > 1 << 20:
                say(f"  {wheel.name}: {size / 2**20:.0f} MiB unpacked")
            if wheel != vllm:
                shutil.copy(wheel, downloads)
        say("compressing, which takes minutes")
        for old in folder.glob(f"{NAME}.*"):
            old.unlink()
        with tarfile.open(fileobj=Parts(folder / NAME, part_bytes), mode="w|xz") as bundle:
            bundle.add(wheels, "wheels")


def pack_project(folder: Path) -> None:
    """Make the small part."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        pip("wheel", "--no-deps", "--wheel-dir", work, str(ROOT))
        with tarfile.open(folder / PROJECT, "w:xz") as bundle:
            bundle.add(work, "wheels")
            for source in SOURCES:
                bundle.add(ROOT / source, f"source/{source}", filter=_no_caches)
    shutil.copy(Path(__file__).with_name("unpack.py"), folder)


def write_sums(folder: Path) -> list[Path]:
    """List the files of the bundle in `SHA256SUMS`."""
    files = [*sorted(folder.glob(f"{NAME}.*")), folder / PROJECT]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return files


def _no_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part-mib", type=int, default=PART_MIB, help="(default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="make the large part again")
    args = parser.parse_args()
    if sys.version_info[:2] != (3, 12):
        say("warning: not Python 3.12; environment markers are evaluated for this Python")
    if args.fresh or not list(args.folder.glob(f"{NAME}.*")):
        pack_vllm(args.folder, args.part_mib << 20)
    pack_project(args.folder)
    for part in write_sums(args.folder):
        print(f"{part.stat().st_size / 2**20:5.1f} MiB  {part}")


if __name__ == "__main__":
    main()
