# SPDX-License-Identifier: Apache-2.0
"""What the routes share: the gateway's parts, the record of a request, and how routes get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

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
        return cls(
            engine=state.engine_client,
            pruning=pruning,
            tracer=tracer,
            models=state.openai_serving_models,
            chat=state.openai_serving_chat,
            completions=state.openai_serving_completion,
            responses=state.openai_serving_responses,
        )


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
