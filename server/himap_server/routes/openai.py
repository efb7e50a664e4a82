# SPDX-License-Identifier: Apache-2.0
"""`/v1`: the OpenAI API. body.py makes a request of a body, answer.py an answer of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from ..errors import GatewayError, Reason
from ..gateway import GatewayDep, RecordDep
from ..schemas import EXAMPLES, ChatRequest, ErrorBody, ResponsesBody, TextRequest
from ..tracing.tracer import ImageTrace
from .answer import answer
from .body import ChatBody, ResponsesBodyDep, TextBody

SCHEMAS: tuple[type[BaseModel], ...] = (ChatRequest, TextRequest, ResponsesBody, ImageTrace)
"""What the documents of the routes refer to, and what a trace is."""


def _documented(model: type[BaseModel], examples: Any) -> dict[str, Any]:
    """What FastAPI's document says of a route whose dependencies read the body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    body = {"content": {"application/json": {"schema": schema, "examples": examples}}}
    return {
        "responses": {200: {"content": {"text/event-stream": {}}}},
        "openapi_extra": {"requestBody": {**body, "required": True}},
    }


router = APIRouter(prefix="/v1", tags=["OpenAI API"])


@router.get("/models")
async def models(gateway: GatewayDep) -> JSONResponse:
    """The served model, with its names."""
    listed = await gateway.model.models.show_available_models()
    return JSONResponse(listed.model_dump())


@router.get(
    "/models/{model_id:path}", responses={404: {"model": ErrorBody, "description": "no such model"}}
)
async def model(model_id: str, gateway: GatewayDep) -> JSONResponse:
    """One model by its name, which may contain slashes."""
    listed = await gateway.model.models.show_available_models()
    for card in listed.data:
        # The middleware has taken slashes out of the path that a name may have.
        if "/".join(filter(None, card.id.split("/"))) == model_id:
            return JSONResponse(card.model_dump())
    text = f"The model `{model_id[:256]}` does not exist."
    raise GatewayError(404, text, reason=Reason.NOT_FOUND, param="model")


@router.post("/chat/completions", **_documented(ChatRequest, EXAMPLES["chat"]))
async def chat(
    body: ChatBody, request: Request, gateway: GatewayDep, record: RecordDep
) -> Response:
    """Chat completions, with `himap` in the request and in the usage of the answer."""
    model = gateway.model
    return await answer(model.chat.create_chat_completion, body, request, model, record)


@router.post("/completions", **_documented(TextRequest, EXAMPLES["text"]))
async def complete(
    body: TextBody, request: Request, gateway: GatewayDep, record: RecordDep
) -> Response:
    """Text completions."""
    model = gateway.model
    return await answer(model.completions.create_completion, body, request, model, record)


@router.post("/responses", **_documented(ResponsesBody, EXAMPLES["responses"]))
async def respond(
    body: ResponsesBodyDep, request: Request, gateway: GatewayDep, record: RecordDep
) -> Response:
    """The Responses API, with the same `himap`. Nothing is stored."""
    model = gateway.model
    # vLLM (0.32) checks this for chat completions only, and ignores the choice here.
    choice = getattr(body, "tool_choice", "auto")
    if choice not in ("auto", "none") and not request.app.state.args.tool_call_parser:
        text = "tool_choice must be auto or none: this server has no --tool-call-parser"
        raise GatewayError(400, text, reason=Reason.INVALID, param="tool_choice")
    return await answer(model.responses.create_responses, body, request, model, record)
