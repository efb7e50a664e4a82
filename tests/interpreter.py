# SPDX-License-Identifier: Apache-2.0
"""Triton without a GPU: kernels run by its interpreter, or only compiled.

In a process of its own, as both are decided when Triton and vLLM are imported. By hand:
`TRITON_INTERPRET=1 pytest tests/interpreted`; `tests/engine/test_interpreted.py` does the same.
"""

from __future__ import annotations

import os
import sys
from typing import Any

WANTED = os.environ.get("TRITON_INTERPRET") == "1"


def enable() -> None:
    """Make vLLM take Triton for usable and choose Model Runner V2; before anything imports it."""
    assert not any(name.partition(".")[0] in ("vllm", "triton") for name in sys.modules)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import Backend, backends  # type: ignore[import-untyped]

    class Driver:
        """Stands where vLLM looks for a Triton that can run here."""

        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = Backend(compiler=None, driver=Driver)
    if WANTED:
        _patch_once()


def _patch_once() -> None:
    """Let functions that kernels call find Triton's language patched.

    The interpreter patches it for each call of such a function anew, which takes a tenth of a
    test's time. What the kernel's start has patched stays until the kernel ends.
    """
    from triton.runtime import interpreter as triton_interpreter  # type: ignore[import-untyped]

    patch, scope_type = triton_interpreter._patch_lang, triton_interpreter._LangPatchScope
    restore = scope_type.restore
    patched: set[int] = set()
    languages: dict[int, frozenset[int]] = {}

    def patch_language(function: Any) -> Any:
        seen = languages.get(id(function.__globals__))
        if seen is None:
            modules = {id(triton_interpreter.tl), id(triton_interpreter.tl.core)}
            seen = frozenset(modules.intersection(map(id, function.__globals__.values())))
            languages[id(function.__globals__)] = seen
        if seen <= patched:
            return scope_type()
        patched.update(seen)
        return patch(function)

    def restore_language(scope: Any) -> None:
        if scope._changes:
            patched.clear()
        restore(scope)

    triton_interpreter._patch_lang = patch_language
    scope_type.restore = restore_language
