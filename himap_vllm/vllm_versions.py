# SPDX-License-Identifier: Apache-2.0
"""What differs between the minors of vLLM that are supported: the one module that knows.

Nothing of vLLM is imported before it is asked for, so this module loads beside any version.
docs/vllm-minors.md tells how a new minor is taken in.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any

SUPPORTED = ("0.32", "0.33")
ONLY_PYTHON = frozenset({"0.33"})
"""Minors without a CPU build: tests ran on their Python files and an older minor's libraries."""

_COMMON_CLI = "vllm.entrypoints.common.cli_args"
_LAUNCHERS_CLI = "vllm.entrypoints.launchers.cli_args"
_CHAT = "vllm.renderers.chat_utils"

MOVED: dict[str, tuple[str, str]] = {
    "FrontendArgs": (_LAUNCHERS_CLI, _COMMON_CLI),
    "make_arg_parser": (_LAUNCHERS_CLI, _COMMON_CLI),
    "validate_parsed_serve_args": (_LAUNCHERS_CLI, _COMMON_CLI),
    "cli_env_setup": (
        "vllm.entrypoints.serve.utils.api_utils",
        "vllm.entrypoints.common.startup",
    ),
    "MM_PARSER_MAP": (_CHAT, f"{_CHAT}.chat_message"),
    "TEXT_PART_TYPES": (_CHAT, f"{_CHAT}.chat_message"),
    "is_quantized_kv_cache": ("vllm.utils.torch_utils", "vllm.v1.kv_cache_interface"),
}
"""Names that are imported from here, with the modules that have them: in 0.32, in 0.33."""

MEDIA_BYTES = "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"
"""Limit for all media of a request, from 0.33 on."""


def __getattr__(name: str) -> Any:
    for place in MOVED.get(name, ()):
        module = _module(place)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{__name__} has no {name} beside vLLM {installed()}")


def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        return None


def installed() -> str:
    """The version of the installed vLLM."""
    import vllm

    version: str = vllm.__version__
    return version


def minor() -> str:
    """The minor of the installed vLLM, as in `SUPPORTED`."""
    return installed().split("+")[0].rpartition(".")[0]


def is_supported() -> bool:
    """Whether the plugin knows this vLLM's internals."""
    return minor() in SUPPORTED


def not_run() -> str | None:
    """What was checked of this minor and what was not; None if it is one that tests run on."""
    if minor() not in ONLY_PYTHON:
        return None
    return (
        f"himap has not been run with the kernels of vLLM {installed()}. Checked: the sources of "
        f"vLLM {minor()} against all imports and seams (docs/seams.md); engines, answers and the "
        f"gateway with its Python files on the libraries of {SUPPORTED[0]}, on CPUs "
        "(docs/vllm-minors.md). Not checked: its own libraries, its torch, GPUs, speed. Compare "
        "answers at ratios of 0 with those of stock vLLM first. himap's whole test suite runs on "
        f"vLLM {SUPPORTED[0]}"
    )


def limit_media(max_pixels: int) -> None:
    """Let vLLM decode images of up to `max_pixels` pixels in one request.

    From 0.33 on, vLLM counts 4 bytes for each pixel, and has a limit for all media of a request.

    * `vllm.envs.environment_variables` (read): tells whether this vLLM has that limit. Remove when:
      0.32 is no longer supported.
    """
    from vllm.envs import environment_variables

    if MEDIA_BYTES in environment_variables:
        os.environ[MEDIA_BYTES] = str(4 * max_pixels)
