# SPDX-License-Identifier: Apache-2.0
"""What a model family declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """A vision-language architecture that can be pruned.

    Attributes:
        architecture: name in the checkpoint's `architectures`.
        decoders: `model_type` of the text configs whose decoder has the form that
            `himap_vllm.decoder` needs.
        decoder: the decoder inside a loaded vLLM model of this architecture.
    """

    architecture: str
    decoders: tuple[str, ...]
    decoder: Callable[[Any], Any]
