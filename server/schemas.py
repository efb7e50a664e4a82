# SPDX-License-Identifier: Apache-2.0
"""The requests of the OpenAI API with the `himap` object, and its translation for the engine."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG

_EXAMPLE: dict[str, Any] = {"enabled": True, "shallow_ratio": 0.5, "deep_ratio": 0.75}


class HiMAPOptions(BaseModel):
    """Pruning of this request's image tokens. What is left out takes the server's default."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_EXAMPLE]})

    enabled: bool = Field(default=True, strict=True, description="false: run unpruned")
    # Numbers only, as JSON has them: pydantic would turn "0.5" and true into numbers.
    shallow_ratio: float | None = Field(
        default=None,
        strict=True,
        ge=0,
        lt=1,
        description="share of each image's tokens dropped at the first cut, in [0, 1)",
    )
    deep_ratio: float | None = Field(
        default=None,
        strict=True,
        ge=0,
        lt=1,
        description="share of the rest dropped at the second cut, in [0, 1)",
    )

    def as_xargs(self) -> dict[str, float]:
        """The same for the engine (`SamplingParams.extra_args`)."""
        if not self.enabled:
            return {SHALLOW_ARG: 0.0, DEEP_ARG: 0.0}
        given = {SHALLOW_ARG: self.shallow_ratio, DEEP_ARG: self.deep_ratio}
        return {key: value for key, value in given.items() if value is not None}


class _WithPruning(BaseModel):
    himap: HiMAPOptions | None = Field(
        default=None, description="pruning of image tokens; see HiMAPOptions"
    )

    def apply_himap(self) -> None:
        """Move `himap` to where the engine reads it."""
        request: Any = self
        if self.himap is not None:
            request.vllm_xargs = {**(request.vllm_xargs or {}), **self.himap.as_xargs()}


class ChatRequest(_WithPruning, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""


class TextRequest(_WithPruning, CompletionRequest):
    """Body of `POST /v1/completions`."""
