# SPDX-License-Identifier: Apache-2.0
"""The FastAPI app. Handlers are vLLM's own; only the routes listed here exist.

vLLM seams (0.32), none of them public, all used because tools, structured output and streaming must
behave as in vLLM: `init_app_state` fills `app.state` with the handlers (server/engine.py), which
are called as vLLM's routes call them; they name a request to the engine `chatcmpl-<request_id>`
and `cmpl-<request_id>-<i>`, and end a stream with a usage chunk without choices (server/usage.py).
Can go when vLLM lets an endpoint plugin wrap its routes and see the engine's view of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

import vllm
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

import himap_vllm

from .errors import error_response
from .images import check_media
from .lifecycle import Lifecycle, Phase
from .metrics import himap_metrics
from .schemas import ChatRequest, TextRequest
from .usage import UsageLedger, add_to_body, add_to_stream

_SCRAPE_SECONDS = 5.0
_JSON = [Depends(validate_json_request)]
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_app(args: Namespace, lifecycle: Lifecycle) -> FastAPI:
    """The app; the engine puts its handlers into `app.state` when it is up."""
    app = FastAPI(title="HiMAP-vLLM", version=himap_vllm.__version__)
    app.state.args = args
    app.state.lifecycle = lifecycle
    app.add_api_route(
        "/v1/chat/completions", chat, methods=["POST"], dependencies=_JSON, responses=_STREAM
    )
    app.add_api_route(
        "/v1/completions", complete, methods=["POST"], dependencies=_JSON, responses=_STREAM
    )
    app.add_api_route("/v1/models", show_available_models, methods=["GET"])
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/health/live", live, methods=["GET"])
    app.add_api_route("/health/ready", ready, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    init_exception_handler(app)
    # vLLM handles FastAPI's own; the router raises Starlette's.
    app.add_exception_handler(HTTPException, http_error)
    return app


async def http_error(_: Request, error: Any) -> Response:
    """404, 405 and the like."""
    return error_response(error.status_code, str(error.detail), type_="invalid_request_error")


@with_cancellation
@load_aware_call
async def chat(request: ChatRequest, raw_request: Request) -> Response:
    """Chat completions, with `himap` in the request and in the usage of the answer."""
    check_media(request.messages)
    handler = raw_request.app.state.openai_serving_chat
    return await _answer("chatcmpl", handler.create_chat_completion, request, raw_request)


@with_cancellation
@load_aware_call
async def complete(request: TextRequest, raw_request: Request) -> Response:
    """Text completions, likewise."""
    handler = raw_request.app.state.openai_serving_completion
    return await _answer("cmpl", handler.create_completion, request, raw_request)


async def _answer(
    prefix: str,
    create: Callable[[Any, Request], Awaitable[Any]],
    request: ChatRequest | TextRequest,
    raw_request: Request,
) -> Response:
    ledger: UsageLedger = raw_request.app.state.usage_ledger
    if request.use_beam_search and (ledger.prunes_by_default or request.himap is not None):
        raise VLLMValidationError(
            "beam search can't be combined with pruning, which the request or this server's "
            "default asks for",
            parameter="use_beam_search",
        )
    request.apply_himap()
    request.request_id = uuid.uuid4().hex
    request_id = f"{prefix}-{request.request_id}"  # as vLLM's handlers name it to the engine
    try:
        answer = await create(request, raw_request)
    except BaseException:  # a client that vanishes cancels
        ledger.take(request_id)
        raise
    if isinstance(answer, ErrorResponse):
        ledger.take(request_id)
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, ChatCompletionResponse | CompletionResponse):
        body = answer.model_dump()
        savings = ledger.take(request_id)
        # Each step of a beam search is a request to the engine: their sum says nothing.
        add_to_body(body, None if request.use_beam_search else savings)
        return JSONResponse(body)
    return StreamingResponse(
        add_to_stream(answer, ledger, request_id), media_type="text/event-stream"
    )


async def version() -> dict[str, str]:
    """Versions of the gateway and of vLLM."""
    return {"version": himap_vllm.__version__, "vllm": vllm.__version__}


async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


async def ready(raw_request: Request) -> JSONResponse:
    """The model answers; 503 while it loads, while the service drains, and when it is dead."""
    phase: Phase = raw_request.app.state.lifecycle.phase
    return JSONResponse({"status": phase.value}, status_code=200 if phase is Phase.READY else 503)


async def metrics(raw_request: Request) -> Response:
    """Prometheus: vLLM's own metrics and the plugin's counters."""
    text = generate_latest(get_prometheus_registry())
    if raw_request.app.state.lifecycle.phase in (Phase.READY, Phase.DRAINING):
        # The engine answers between steps, and a dead one never; vLLM's part must not suffer.
        with contextlib.suppress(TimeoutError, EngineDeadError):
            engine = raw_request.app.state.engine_client
            text += await asyncio.wait_for(himap_metrics(engine), _SCRAPE_SECONDS)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
