# SPDX-License-Identifier: Apache-2.0
"""Engines in the command's own process, for commands that look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .items import Item


def start_engine(
    model: str | None,
    flags: Sequence[str],
    himap: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Start vLLM's `LLM`.

    Args:
        model: a path or a name on the hub; None: the bundled model, with flags that suit it.
        flags: of vLLM's engine.
        himap: settings of pruning; None: none.
        settings: attributes of `EngineArgs`, whatever the flags say.
    """
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if model is None:
        from himap_server.bundled import bundled_model

        model = str(bundled_model().path)
        flags = flags or ["--enforce-eager", "--kv-cache-memory-bytes", "256M"]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags]))
    if himap is not None:
        engine.additional_config = {**(engine.additional_config or {}), "himap": dict(himap)}
    for name, value in settings.items():
        setattr(engine, name, value)
    return LLM.from_engine_args(engine)


def messages_of(item: Item) -> Any:
    """A question as a conversation."""
    image = {"type": "image_url", "image_url": {"url": item.image_url()}}
    return [{"role": "user", "content": [image, {"type": "text", "text": item.question}]}]
