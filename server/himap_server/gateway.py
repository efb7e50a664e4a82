# SPDX-License-Identifier: Apache-2.0
"""What the routes share: the gateway's parts, the record of a request, and how routes get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.v1.engine.async_llm import AsyncLLM

from .lifecycle import Lifecycle
from .media import MediaCheck
from .pruning import PruningPolicy
from .record import RequestRecord
from .tracing.tracer import Tracer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The loaded model: the engine's client, vLLM's handlers, pruning and traces of requests."""

    engine: AsyncLLM
    pruning: PruningPolicy
    tracer: Tracer
    models: OpenAIServingModels
    chat: OpenAIServingChat
    completions: OpenAIServingCompletion
    responses: OpenAIServingResponses

    @classmethod
    def from_vllm(cls, state: State, pruning: PruningPolicy, tracer: Tracer) -> ServedModel:
        """The handlers that `init_app_state` has put into `state`."""
        _echo_texts(state.openai_serving_chat)
        return cls(
            engine=state.engine_client,
            pruning=pruning,
            tracer=tracer,
            models=state.openai_serving_models,
            chat=state.openai_serving_chat,
            completions=state.openai_serving_completion,
            responses=state.openai_serving_responses,
        )


def _echo_texts(chat: OpenAIServingChat) -> None:
    """Let `echo` repeat the texts of a message that has parts.

    * `vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat.render_chat_request`
      (wrapped): the handler repeats the last of the messages that it returns, and fails if that has
      an image, or parts in a stream. The prompt is ready by then. Remove when: vLLM repeats
      the texts of such messages.
    """
    render = chat.render_chat_request

    async def render_chat_request(request: Any) -> Any:
        rendered = await render(request)
        if request.echo and isinstance(rendered, tuple) and rendered[0]:
            last: Any = rendered[0][-1]
            if isinstance(last.get("content"), list):
                texts = [part["text"] for part in last["content"] if "text" in part]
                last["content"] = "\n".join(texts)
        return rendered

    chat.render_chat_request = render_chat_request


@dataclass(slots=True)
class Gateway:
    """The parts of the gateway; `app.state.gateway`.

    Attributes:
        loaded: None until the model is loaded.
    """

    lifecycle: Lifecycle
    media: MediaCheck
    needs_key: bool
    loaded: ServedModel | None = None

    @property
    def model(self) -> ServedModel:
        """The loaded model. The request middleware lets no request in before."""
        assert self.loaded is not None, "a request came in before the model was loaded"
        return self.loaded


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


GatewayDep = Annotated[Gateway, Depends(_gateway)]
RecordDep = Annotated[RequestRecord, Depends(_record)]
"""The record that the request middleware has made; only for routes below /v1."""
