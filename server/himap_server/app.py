# SPDX-License-Identifier: Apache-2.0
"""The FastAPI app: it has the routes of routes/ only, and every error has OpenAI's shape.

* `vllm.entrypoints.serve.exception_handling.register.init_exception_handler` (called): errors of
  vLLM's handlers get the answers that vLLM's server gives; it reads `app.state.args`. What it
  registers is found by its module, and answers with an `ErrorResponse`. Remove when: an endpoint
  plugin of vLLM can wrap vLLM's routes.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.v1.engine.exceptions import EngineDeadError

import himap_vllm

from .checked_images import ImageStore
from .errors import GatewayError, Reason, error_body, error_response, param_of
from .gateway import Gateway
from .lifecycle import Lifecycle
from .media import MediaCheck
from .playground.routes import is_on, playground
from .routes import openai, operations
from .schemas import ErrorBody
from .security.fetch import FetchLimits, ImageFetcher
from .security.images import ImageLimits
from .settings import GatewaySettings

_ANY_ERRORS = {
    "401": "no valid API key",
    "408": "the request took too long",
    "413": "body or image too large",
    "429": "the API key's limits; see Retry-After",
    "503": "loading, draining, overloaded, or the engine is dead; see Retry-After",
}
_POST_ERRORS = _ANY_ERRORS | {
    "400": "something in the request is wrong; `param` names it",
    "403": "the API key does not allow it",
    "404": "no such model",
    "415": "the body is not JSON, or compressed",
    "500": "an error of the engine",
    "501": "not supported by the model",
}


def build_app(args: Namespace, settings: GatewaySettings, lifecycle: Lifecycle) -> FastAPI:
    """The app, with its `Gateway` as `app.state.gateway`; the model is loaded later."""
    app = FastAPI(title="HiMAP-vLLM", version=himap_vllm.__version__, redirect_slashes=False)
    app.state.args = args
    app.state.gateway = Gateway(
        lifecycle, _media_check(settings), needs_key=settings.api_keys_file is not None
    )
    app.include_router(openai.router)
    app.include_router(operations.router)
    if is_on(args.host, settings.playground):
        app.include_router(playground(args, settings))
    init_exception_handler(app)
    for kind, handler in list(app.exception_handlers.items()):
        if handler.__module__.startswith("vllm."):
            app.add_exception_handler(kind, _in_openai_shape(handler))
    # vLLM handles FastAPI's own; the router raises Starlette's.
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(GatewayError, _refused)
    # vLLM's handler would answer 500 and stop the server; the engine's watcher stops it.
    app.add_exception_handler(EngineDeadError, _engine_dead)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _media_check(settings: GatewaySettings) -> MediaCheck:
    store = ImageStore(settings.max_image_pixels)
    store.register()
    fetcher = None
    if settings.fetch_images:
        limits = FetchLimits(
            max_bytes=settings.max_image_bytes,
            timeout_seconds=settings.image_timeout,
            allowed_hosts=settings.image_hosts,
            user_agent=settings.image_user_agent,
        )
        fetcher = ImageFetcher(limits)
    return MediaCheck(
        store,
        ImageLimits(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            min_side=settings.min_image_side,
        ),
        settings.max_images,
        settings.max_request_pixels,
        settings.max_body_bytes,  # fetched or sent along
        fetcher,
        settings.max_named_image_bytes,
    )


def _in_openai_shape(handler: Any) -> Any:
    """vLLM's handler with the words of our errors, because clients branch on them."""

    async def handle(request: Request, error: Exception) -> Response:
        response: Response = await handler(request, error)
        found = ErrorResponse.model_validate_json(response.body).error
        body = error_body(int(response.status_code), found.message, param_of(found.param))
        return JSONResponse(body, int(response.status_code))

    return handle


async def _refused(request: Request, error: Any) -> Response:
    record = getattr(request.state, "record", None)  # only requests to /v1 have one
    if record is not None and isinstance(error, GatewayError):
        record.reason = error.reason
    return error_response(error)


async def _engine_dead(request: Request, _: Exception) -> Response:
    return await _refused(request, GatewayError(503, "the engine is dead", reason=Reason.FAILED))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the bodies and errors of `/v1`, and without 422, never sent."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models: tuple[type[BaseModel], ...] = (*openai.SCHEMAS, ErrorBody)
        _, schemas = models_json_schema(
            [(model, "validation") for model in models],
            ref_template="#/components/schemas/{model}",
        )
        components: dict[str, Any] = {"schemas": schemas["$defs"]}
        document["components"] = components
        needs_key = app.state.gateway.needs_key
        if needs_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        for path, operations_ in document["paths"].items():
            for method, operation in operations_.items():
                operation["responses"].pop("422", None)
                if not path.startswith("/v1/"):
                    continue
                if needs_key:
                    operation["security"] = [{"key": []}]
                errors = _POST_ERRORS if method == "post" else _ANY_ERRORS
                for status, text in errors.items():
                    operation["responses"][status] = {"description": text, "content": content}
        app.openapi_schema = document
    return app.openapi_schema
