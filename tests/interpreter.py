# SPDX-License-Identifier: Apache-2.0
"""Triton without a GPU: kernels run by its interpreter, or only compiled.

In a process of its own, as both are decided when Triton and vLLM are imported. By hand:
`TRITON_INTERPRET=1 pytest tests/interpreted`; `tests/engine/test_interpreted.py` does the same.
"""

from __future__ import annotations

import os
import sys

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
