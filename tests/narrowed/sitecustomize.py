# SPDX-License-Identifier: Apache-2.0
"""Narrows the processor for each Python process that finds this on its path; see docs/testing.md.

vLLM asks `torch.cpu` which kernels the processor can run, and no environment variable overrides
the answers. `HIMAP_TEST_ISA` does, here: the widest instruction set that they admit.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What each level does not have.
_WIDER = {
    "avx512_bf16": ("amx_tile", "amx_fp16"),
    "avx512": ("amx_tile", "amx_fp16", "avx512_bf16", "vnni"),
    "avx2": ("amx_tile", "amx_fp16", "avx512_bf16", "vnni", "avx512"),
}


def absent() -> bool:
    """What `torch.cpu` says of an instruction set that is not to be used."""
    return False


class Finder:
    """Replaces the answers once `torch.cpu` is loaded, whoever imports it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def narrowed(module: ModuleType) -> None:
            load(module)
            for instructions in _WIDER[os.environ["HIMAP_TEST_ISA"]]:
                setattr(module, f"_is_{instructions}_supported", absent)

        loader.exec_module = narrowed
        return spec


if "HIMAP_TEST_ISA" in os.environ:
    sys.meta_path.insert(0, Finder)
