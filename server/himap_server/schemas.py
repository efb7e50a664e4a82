# SPDX-License-Identifier: Apache-2.0
"""Requests of the OpenAI API with the `himap` object, and the shape of errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import override
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponseInputOutputItem, ResponsesRequest
from vllm.renderers import TokenizeParams
from vllm.renderers.chat_utils import ChatCompletionMessageParam
from vllm.sampling_params import SamplingParams

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG, VOTES_ARG, Votes

from .messages import settle_items, settle_messages

_HIMAP: dict[str, Any] = {"enabled": True, "shallow_ratio": 0.5, "deep_ratio": 0.75}
_IMAGE = "https://upload.wikimedia.org/wikipedia/commons/a/a7/Camponotus_flavomarginatus_ant.jpg"
_QUESTION = "What is in this image?"


def _examples(**body: Any) -> Any:
    return {"image": {"value": {"model": "the served model's name", **body}}}


EXAMPLES: dict[str, Any] = {
    "chat": _examples(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": _IMAGE}},
                    {"type": "text", "text": _QUESTION},
                ],
            }
        ],
        max_tokens=64,
        himap=_HIMAP,
    ),
    "responses": _examples(
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": _IMAGE},
                    {"type": "input_text", "text": _QUESTION},
                ],
            }
        ],
        max_output_tokens=64,
        himap=_HIMAP,
    ),
    "text": _examples(prompt="Once upon a time", max_tokens=64),
}


class HiMAPOptions(BaseModel):
    """Pruning of this request's image tokens. A missing ratio takes the server's default."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_HIMAP]})

    enabled: bool = Field(default=True, strict=True, description="false: run unpruned")
    # Strict, because pydantic would turn "0.5" and true into numbers.
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

    votes: Votes | None = Field(
        default=None,
        description="text that votes for an image: that of its turn, or all text behind it",
    )
    trace: Literal[True, False, "scores"] = Field(
        default=False,
        description="true: return which image tokens each cut kept, and where they lie in the "
        'picture; "scores": their scores, too. See ImageTrace',
    )

    def as_xargs(self) -> dict[str, Any]:
        """The options as the engine reads them (`SamplingParams.extra_args`)."""
        if not self.enabled:
            return {SHALLOW_ARG: 0.0, DEEP_ARG: 0.0}
        given = {
            SHALLOW_ARG: self.shallow_ratio,
            DEEP_ARG: self.deep_ratio,
            VOTES_ARG: self.votes,
        }
        return {key: value for key, value in given.items() if value is not None}


# Fields whose contents are a client's own: a null there is a value.
_OWN = frozenset(
    {"parameters", "schema", "json", "arguments", "metadata", "documents", "chat_template_kwargs"}
    | {"vllm_xargs", "mm_processor_kwargs", "media_io_kwargs", "kv_transfer_params", "input_schema"}
    | {"logit_bias"}
)
# A message that must have one is refused without, and an assistant's may be null.
_KEPT = frozenset({"content"})


def drop_nulls(body: Any) -> None:
    """Take optional fields that are null out of a body, in place: their defaults hold.

    Clients send what their classes have, and vLLM's schemas take null for some fields only.
    """
    rest = [body]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            for key in [key for key, value in node.items() if value is None and key not in _KEPT]:
                del node[key]
            if node.get("type") == "structural_tag":
                continue  # its schemas stand below names of its own
            rest.extend(
                value
                for key, value in node.items()
                if isinstance(value, dict | list) and key not in _OWN
            )
        else:
            rest.extend(value for value in node if isinstance(value, dict | list))


_GREEDY = {"top_k": 1}
"""Sampling from one token."""


class _WithPruning(BaseModel):
    """What the three bodies have in common.

    * `vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.to_sampling_params`,
      `vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_sampling_params`,
      `vllm.entrypoints.openai.responses.protocol.ResponsesRequest.to_sampling_params` (overridden):
      vLLM (0.32) refuses a `top_p` of 0 and several greedy answers, which OpenAI gives, and asks
      for log probabilities of the prompt at `echo` in a chat. Remove when: vLLM does as OpenAI.
    """

    ID_PREFIX: ClassVar[str] = ""
    """Prefix of the request id, where vLLM's handler does not add one itself."""

    # Answer and log repeat a wrong name.
    model: str | None = Field(default=None, max_length=256)
    himap: HiMAPOptions | None = Field(
        default=None, description="pruning of image tokens; see HiMAPOptions"
    )

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """As vLLM's, with what OpenAI accepts."""
        asked: Any = self
        changes: dict[str, Any] = {}
        if asked.top_p == 0:
            changes |= {"top_p": 1.0, **_GREEDY}
        if (getattr(asked, "n", None) or 1) > 1 and asked.temperature == 0:
            changes |= {"temperature": 1.0, **_GREEDY}
        if isinstance(self, ChatRequest) and self.prompt_logprobs is None:
            changes["echo"] = False
        changed: Any = self.model_copy(update=changes)
        vllms: Any = super(_WithPruning, changed)
        params: SamplingParams = vllms.to_sampling_params(*args, **kwargs)
        return params

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if isinstance(body, dict):
            drop_nulls(body)
            settle_messages(body.get("messages"))
            settle_items(body.get("input"))
        return body


# Stop at the first bad item: each has hundreds of errors, one per type that it does not match.
class ChatRequest(_WithPruning, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatCompletionMessageParam], Field(fail_fast=True)]


class TextRequest(_WithPruning, CompletionRequest):
    """Body of `POST /v1/completions`."""

    @model_validator(mode="after")
    def _one_prompt_of_beams(self: Any) -> Any:
        """Otherwise a second prompt would look like a step of the first one, which has no limit."""
        prompt = self.prompt
        several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
        if self.use_beam_search and several:
            raise ValueError("a beam search takes one prompt")
        return self


class ResponsesBody(_WithPruning, ResponsesRequest):
    """Body of `POST /v1/responses`.

    * `vllm.entrypoints.openai.responses.protocol.ResponsesRequest.build_tok_params` (overridden):
      with `truncation: auto` vLLM (0.32) may cut off the tokens of an image, and answers 500.
      Remove when: vLLM truncates prompts with images, or refuses to.
    """

    ID_PREFIX = "resp_"
    input: str | Annotated[list[ResponseInputOutputItem], Field(fail_fast=True)]
    _whole: bool = PrivateAttr(default=False)

    def keep_whole(self) -> None:
        """Let the prompt be refused, and not truncated, if it is too long."""
        self._whole = True

    @override
    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        params = super().build_tok_params(model_config)
        return replace(params, truncate_prompt_tokens=None) if self._whole else params


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="the field of the request that is at fault")
    code: str | None = Field(description="OpenAI's word for it, if it has one")


class ErrorBody(BaseModel):
    """Every error of `/v1`."""

    error: ErrorInfo
