# SPDX-License-Identifier: Apache-2.0
"""`/v1`: vLLM's own handlers, called as vLLM's routes call them.

vLLM seams (0.32), none of them public, all used because tools, structured output and streaming must
behave as in vLLM: `init_app_state` fills `app.state` with the handlers (engine.py); they
yield server-sent events as text (events of the Responses API as objects), an error as an event
`{"error": ...}`, and usage in a chunk without choices. Can go when vLLM lets an endpoint plugin
wrap its routes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG

from ..errors import GatewayError
from ..record import RequestRecord, current
from ..schemas import EXAMPLES, ChatRequest, ResponsesBody, TextRequest
from ..security.grammars import check_repetitions

logger = init_logger("vllm.himap.server")

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_MAX_VALUES = 1_000_000
_MAX_INTEGER = 2**63 - 1
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRUCTURE = ("structured_outputs", "response_format", "tools", "text")
_UNDECODABLE = "Failed to load image"
_FIELDS = {SHALLOW_ARG: "himap.shallow_ratio", DEEP_ARG: "himap.deep_ratio"}
_ERROR_EVENT = 'data: {"error"'


def _parse(raw: bytes) -> Any:
    """JSON with what the engine can take: more would fail on its way there, as an error of ours."""
    # Megabytes of small values hold up everything else for seconds; of text and images, not.
    if len(raw) > _MAX_VALUES and _num_values(raw) > _MAX_VALUES:
        text = f"the body has more than {_MAX_VALUES} values"
        raise GatewayError(413, text, reason="body_values")
    body = json.loads(raw, parse_constant=_refuse_constant, parse_int=_integer)
    if _SURROGATE.search(raw):
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            text = "the body has half of a surrogate pair, which is no character"
            raise GatewayError(400, text, reason="invalid") from None
    return body


def _num_values(raw: bytes) -> int:
    # bytes.count takes ten times as long where there are many.
    return int(np.count_nonzero(np.frombuffer(raw, np.uint8) == ord(",")))


def _refuse_constant(name: str) -> Any:
    raise GatewayError(400, f"{name} is not JSON", reason="invalid")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= len(str(_MAX_INTEGER)) + 1 else _MAX_INTEGER + 1
    if abs(value) > _MAX_INTEGER:
        raise GatewayError(400, f"{digits[:32]} is too large a number", reason="invalid")
    return value


class _CheckedRequest(Request):
    async def json(self) -> Any:
        """The body, its images and text checked: what pydantic, and vLLM, get to see."""
        body = _parse(await self.body())
        check_repetitions(body)
        await self.app.state.media(body, current.get())
        return body


class _CheckedRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(_CheckedRequest(request.scope, request.receive))

        return checked


router = APIRouter(prefix="/v1", tags=["OpenAI API"], route_class=_CheckedRoute)
router.add_api_route("/models", show_available_models, methods=["GET"])


@router.post("/chat/completions", responses=_STREAM)
async def chat(
    request: Annotated[ChatRequest, Body(openapi_examples=EXAMPLES["chat"])], raw_request: Request
) -> Response:
    """Chat completions, with `himap` in the request and in the usage of the answer."""
    handler = raw_request.app.state.openai_serving_chat
    return await _answer(handler.create_chat_completion, request, raw_request)


@router.post("/completions", responses=_STREAM)
async def complete(
    request: Annotated[TextRequest, Body(openapi_examples=EXAMPLES["text"])], raw_request: Request
) -> Response:
    """Text completions."""
    handler = raw_request.app.state.openai_serving_completion
    return await _answer(handler.create_completion, request, raw_request)


@router.post("/responses", responses=_STREAM)
async def respond(
    request: Annotated[ResponsesBody, Body(openapi_examples=EXAMPLES["responses"])],
    raw_request: Request,
) -> Response:
    """The Responses API, likewise. Nothing is stored."""
    handler = raw_request.app.state.openai_serving_responses
    return await _answer(handler.create_responses, request, raw_request)


async def _answer(
    create: Callable[[Any, Request], Awaitable[Any]],
    request: ChatRequest | TextRequest | ResponsesBody,
    raw_request: Request,
) -> Response:
    record = current.get()
    _refuse_truncation(request, record)
    raw_request.app.state.pruning.apply(request, record.key)
    record.stream = bool(request.stream)
    request.request_id = f"{request.ID_PREFIX}{uuid.uuid4().hex}"
    record.hand_over()
    # vLLM (0.32) sends an image that it has sent before as a hash; where the request that brought
    # it was refused or aborted on its way, the engine has never seen it, and fails. Both sides know
    # by then, and the request succeeds when it is made again. Can go when vLLM does that itself.
    for _ in range(2 if record.images else 1):
        record.start_over()
        try:
            response = await _try(create, request, raw_request, record)
        except Exception:
            if not record.failed_at_once:
                raise
        else:
            if not record.failed_at_once:
                return response
    if any(getattr(request, name, None) for name in _STRUCTURE):
        text = "the engine can't generate what the grammar, schema or tools ask for"
        raise GatewayError(400, text, reason="grammar")
    raise GatewayError(500, "the engine failed at this request", reason="error")


def _refuse_truncation(request: Any, record: RequestRecord) -> None:
    """vLLM (0.32) fails on an image whose tokens are cut off, with 500."""
    for param, off in (("truncate_prompt_tokens", None), ("truncation", "disabled")):
        if record.images and getattr(request, param, off) not in (None, off):
            text = f"{param} can't be combined with images"
            raise GatewayError(400, text, reason="truncation", param=param)


async def _try(
    create: Callable[[Any, Request], Awaitable[Any]],
    request: Any,
    raw_request: Request,
    record: RequestRecord,
) -> Response:
    try:
        answer = await create(request, raw_request)
        if isinstance(answer, ErrorResponse):
            return _error(answer, request)
        if isinstance(answer, BaseModel):
            body = answer.model_dump(mode="json", by_alias=True)
            _add_savings(body, record)
            return JSONResponse(body)
        opening, refusal = await _open(answer)
    except VLLMClientError as error:
        return _error(create_error_response(error), request)
    except ValueError as error:
        if _UNDECODABLE in str(error):
            return _error(create_error_response(error), request)
        raise
    except (AssertionError, AttributeError, LookupError) as error:
        # Of vLLM's parsers and templates, for requests of a form that they did not think of.
        if record.prompt_tokens:
            raise
        logger.warning("no prompt could be made of a request: %s", type(error).__name__)
        text = "no prompt can be made of this request: check the form of its messages"
        raise GatewayError(400, text, reason="invalid") from None
    if refusal is not None:
        return _error(ErrorResponse.model_validate(refusal), request)
    return StreamingResponse(_stream(opening, answer, record), media_type="text/event-stream")


def _error(answer: ErrorResponse, request: Any) -> Response:
    error = answer.error
    if _UNDECODABLE in error.message:
        # The decoder's own words can tell of its memory: CVE-2026-22778.
        raise GatewayError(400, "an image can't be decoded", reason="image_broken")
    if request.himap is not None:  # fields by the names that the client gave them
        for arg, field in _FIELDS.items():
            error.message = error.message.replace(arg, field)
        error.param = _FIELDS.get(error.param or "", error.param)
    return JSONResponse(answer.model_dump(), status_code=error.code)


async def _open(events: AsyncIterator[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """The first events of a stream, and the error that is among them.

    Before the engine's first output, a refusal by the engine is still a proper status: vLLM by
    itself has sent 200 by then.
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
    opening: list[Any], events: AsyncIterator[Any], record: RequestRecord
) -> AsyncIterator[str]:
    for event in opening:
        yield _to_text(event, record)
    try:
        async for event in events:
            yield _to_text(event, record)
    except Exception as error:
        # vLLM's chat and text streams do this themselves.
        failure = create_error_response(error)
        record.status = failure.error.code
        yield f"event: error\ndata: {failure.model_dump_json()}\n\n"


def _to_text(event: Any, record: RequestRecord) -> str:
    if isinstance(event, str):
        if event.startswith(_ERROR_EVENT):
            record.status = json.loads(event.removeprefix("data: "))["error"]["code"]
        elif record.savings and '"choices":[]' in event and '"usage":{' in event:
            chunk = json.loads(event.removeprefix("data: "))
            _add_savings(chunk, record)
            return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        return event
    body = event.model_dump(mode="json", by_alias=True)
    if event.type == "response.completed":
        _add_savings(body["response"], record)
    return f"event: {event.type}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"


def _add_savings(body: dict[str, Any], record: RequestRecord) -> None:
    savings = record.usage()
    if savings is not None and body.get("usage"):
        body["usage"]["himap"] = savings
