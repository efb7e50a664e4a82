# SPDX-License-Identifier: Apache-2.0
"""Answers of `/v1`: vLLM's own handlers, called as vLLM's routes call them.

Tools, structured output and streaming thereby behave as in vLLM.

* `vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat.create_chat_completion`,
  `vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion.create_completion`,
  `vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.create_responses` (called): they
  yield server-sent events as text (those of the Responses API as objects), an error as an event
  `{"error": ...}`, and usage in a chunk without choices. Remove when: an endpoint plugin of vLLM
  can wrap vLLM's routes.
* `vllm.entrypoints.serve.exception_handling.error_response.create_error_response` (called): makes
  the same error of an exception as vLLM's routes. Remove when: as above.
* `vllm.entrypoints.serve.utils.orca_metrics.metrics_header` (called): the engine's load in a header
  for load balancers (ORCA), as vLLM's routes have it. Remove when: as above.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG

from ..decoding import UNDECODABLE
from ..error_fields import GRAMMARS, field_of, grammar_field, prompt_field
from ..errors import GatewayError, Reason, error_body, error_event
from ..gateway import ServedModel
from ..record import RequestRecord
from ..response_objects import complete_event, complete_response
from ..schemas import ChatRequest, ResponsesBody, TextRequest
from ..tracing.tracer import Tracer

logger = init_logger("vllm.himap.server")

_FIELDS = {SHALLOW_ARG: "himap.shallow_ratio", DEEP_ARG: "himap.deep_ratio"}
# For proxies: nginx would hold a stream back.
_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_ERROR_EVENT = 'data: {"error"'

Handler = Callable[[Any, Request], Awaitable[Any]]
"""One of vLLM's: it takes a validated body and the request that brought it."""


async def answer(
    handler: Handler,
    body: ChatRequest | TextRequest | ResponsesBody,
    request: Request,
    model: ServedModel,
    record: RequestRecord,
) -> Response:
    """The answer to a checked request.

    * `vllm.multimodal.cache.lru.LruKeyReplicatedSenderCache` (read): vLLM sends an image that it
      has sent before as a hash. If the request that brought the image was refused or aborted on its
      way, the engine has never seen it, and fails. Both sides know by then, and a second attempt
      succeeds. Remove when: vLLM makes that attempt, or keeps both caches alike.

    Raises:
        GatewayError: the gateway or the engine refuses the request.
    """
    _settle_truncation(body, record)
    if getattr(body, "background", False):
        text = "background must be false: this server stores no responses"
        raise GatewayError(400, text, reason=Reason.INVALID, param="background")
    xargs = getattr(body, "vllm_xargs", None) or {}
    record.asked = (
        body.himap is not None
        or not xargs.keys().isdisjoint(_FIELDS)
        or any(detail != "auto" for detail in record.details)
    )
    model.pruning.apply(body, record.key, record.details)
    model.tracer.ask(body, record)
    record.beam_search = getattr(body, "use_beam_search", False)
    record.stream = bool(body.stream)
    body.request_id = f"{body.ID_PREFIX}{uuid.uuid4().hex}"
    record.hand_over()
    for _ in range(2 if record.images else 1):
        record.start_over()
        try:
            response = await _try(handler, body, request, model.tracer, record)
        except Exception:
            if not record.failed_at_once:
                raise
        else:
            if not record.failed_at_once:
                form = request.headers.get("endpoint-load-metrics-format", "").upper()
                if form in ("TEXT", "JSON"):  # vLLM would log each of the others
                    response.headers.update(metrics_header(form) or {})
                return response
    if any(getattr(body, name, None) for name in GRAMMARS):
        text = "the engine can't generate what the grammar, schema or tools ask for"
        param = grammar_field(type(body).model_fields, _given(body))
        raise GatewayError(400, text, reason=Reason.GRAMMAR, param=param)
    raise GatewayError(500, "the engine failed at this request", reason=Reason.ERROR)


def _settle_truncation(body: Any, record: RequestRecord) -> None:
    """vLLM (0.32) answers 500 if the tokens of an image are cut off: such a prompt stays whole.

    `truncation` asks for it only if a prompt is too long. With images such a prompt is refused.
    """
    if not record.images:
        return
    if getattr(body, "truncate_prompt_tokens", None) is not None:
        text = "truncate_prompt_tokens can't be combined with images"
        raise GatewayError(400, text, reason=Reason.TRUNCATION, param="truncate_prompt_tokens")
    if isinstance(body, ResponsesBody):
        body.keep_whole()


async def _try(
    handler: Handler, body: Any, request: Request, tracer: Tracer, record: RequestRecord
) -> Response:
    try:
        result = await handler(body, request)
        if isinstance(result, ErrorResponse):
            return _error(result, body)
        if isinstance(result, BaseModel):
            content = result.model_dump(mode="json", by_alias=True)
            if isinstance(body, ResponsesBody):
                complete_response(content, body)
            await _add_savings(content, tracer, record)
            return JSONResponse(content)
        opening, refusal = await _open(result)
    except VLLMClientError as error:
        return _error(create_error_response(error), body)
    except (AssertionError, AttributeError, LookupError, ValidationError) as error:
        # vLLM's parsers and templates raise these for request shapes they do not handle.
        if record.prompt_tokens:
            raise _failed() from None
        logger.warning("no prompt could be made of a request: %s", type(error).__name__)
        text = "no prompt can be made of this request: check the form of its messages"
        param = prompt_field(type(body).model_fields)
        raise GatewayError(400, text, reason=Reason.INVALID, param=param) from None
    except ValueError as error:
        if record.completion_tokens:
            raise _failed() from None
        return _error(create_error_response(error), body)
    if refusal is not None or record.failed_at_once:
        await result.aclose()  # nobody will read the rest
    if refusal is not None:
        return _error(ErrorResponse.model_validate(refusal), body)
    events = _stream(opening, result, body, tracer, record)
    return StreamingResponse(events, headers=_UNBUFFERED, media_type="text/event-stream")


def _failed() -> GatewayError:
    """The error of a request that was in order; logs what failed."""
    logger.exception("an answer failed")
    text = "the answer could not be made into a response"
    return GatewayError(500, text, reason=Reason.ERROR)


def _error(result: ErrorResponse, body: Any) -> Response:
    error = result.error
    if UNDECODABLE in error.message:
        raise GatewayError(400, UNDECODABLE, reason=Reason.IMAGE_BROKEN)
    error.param = field_of(error.message, error.param, type(body), _given(body))
    if body.himap is not None:  # fields by the names that the client gave them
        for arg, field in _FIELDS.items():
            error.message = error.message.replace(arg, field)
        error.param = _FIELDS.get(error.param or "", error.param)
    return JSONResponse(error_body(error.code, error.message, error.param), error.code)


def _given(body: Any) -> list[str]:
    """The fields that a request has."""
    return [name for name in body.model_fields_set if getattr(body, name, None) is not None]


async def _open(events: AsyncIterator[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """The first events of a stream, and the error among them.

    A refusal before the engine's first output still gets its own status here; vLLM by itself has
    sent 200 by then.
    """
    opening = []
    async for event in events:
        opening.append(event)
        kind = getattr(event, "type", None)
        if kind in ("response.created", "response.in_progress"):
            continue
        if kind is None and event.startswith(_ERROR_EVENT):
            refusal: dict[str, Any] = json.loads(event.removeprefix("data: "))
            return opening, refusal
        break
    return opening, None


async def _stream(
    opening: list[Any],
    events: AsyncIterator[Any],
    body: Any,
    tracer: Tracer,
    record: RequestRecord,
) -> AsyncIterator[str]:
    for event in opening:
        yield await _to_text(event, body, tracer, record)
    try:
        async for event in events:
            yield await _to_text(event, body, tracer, record)
    except Exception as error:
        # vLLM's chat and text streams do this themselves.
        yield _failure(create_error_response(error), record)


async def _to_text(event: Any, asked: Any, tracer: Tracer, record: RequestRecord) -> str:
    if isinstance(event, str):
        if event.startswith(_ERROR_EVENT):
            failure = json.loads(event.removeprefix("data: "))
            return _failure(ErrorResponse.model_validate(failure), record)
        if record.savings and '"choices":[]' in event and '"usage":{' in event:
            chunk = json.loads(event.removeprefix("data: "))
            await _add_savings(chunk, tracer, record)
            return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        return event
    body = event.model_dump(mode="json", by_alias=True)
    complete_event(body, asked)
    record.next_event = event.sequence_number + 1
    if event.type == "response.completed":
        # vLLM (0.32) says so of truncated responses, too.
        if body["response"]["status"] == "incomplete":
            body["type"] = "response.incomplete"
        await _add_savings(body["response"], tracer, record)
    return f"event: {body['type']}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"


def _failure(result: ErrorResponse, record: RequestRecord) -> str:
    """The event that ends a stream with an error of the engine."""
    error = result.error
    record.status = error.code
    return error_event(error_body(error.code, error.message, error.param), record.next_event)


async def _add_savings(body: dict[str, Any], tracer: Tracer, record: RequestRecord) -> None:
    """Add `usage.himap`, unless neither client nor operator prunes: clients compare usage."""
    savings = record.usage() if record.asked or record.pruned else None
    if savings is None or not body.get("usage"):
        return
    body["usage"]["himap"] = savings
    savings["cached_tokens"] = record.cached_tokens
    if record.trace is not None:
        await tracer.collect(record)
        for image, trace in zip(savings["images"], record.trace.images or (), strict=False):
            image["trace"] = trace
