# SPDX-License-Identifier: Apache-2.0
"""Refusals, and errors in OpenAI's shape."""

from __future__ import annotations

import enum
import json
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class Reason(enum.StrEnum):
    """Why a request was not answered.

    The log has it as `reason`, and it is a label of `himap_refused_requests_total`. docs/gateway.md
    says what each means.
    """

    KEY = "key"
    RATE = "rate"
    CONCURRENCY = "concurrency"
    RATIO = "ratio"

    HEADERS = "headers"
    TYPE = "type"
    BODY_BYTES = "body_bytes"
    BODY_VALUES = "body_values"
    PARTS = "parts"
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    METHOD = "method"
    WEBSOCKET = "websocket"

    BEAM_SEARCH = "beam_search"
    TRUNCATION = "truncation"
    GRAMMAR = "grammar"
    PROMPT_TOKENS = "prompt_tokens"
    PLACEHOLDER = "placeholder"

    MEDIA = "media"
    IMAGE_COUNT = "image_count"
    IMAGE_URL = "image_url"
    IMAGE_HOST = "image_host"
    IMAGE_FETCH = "image_fetch"
    IMAGE_TYPE = "image_type"
    IMAGE_BYTES = "image_bytes"
    IMAGE_PIXELS = "image_pixels"
    IMAGE_SIDE = "image_side"
    IMAGE_BROKEN = "image_broken"

    TIMEOUT = "timeout"
    CLIENT_WENT_AWAY = "client_went_away"
    ENGINE_BUSY = "engine_busy"
    LOADING = "loading"
    DRAINING = "draining"
    FAILED = "failed"
    ERROR = "error"


class GatewayError(HTTPException):
    """A request that the gateway refuses.

    Attributes:
        reason: for logs and metrics.
        param: the field of the request that is at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: Reason,
        param: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if retry_after is not None:
            headers = {"retry-after": str(retry_after)}
        super().__init__(status, message, headers)
        self.reason = reason
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: HTTPException) -> JSONResponse:
    """The answer to a request that the gateway or the router (404, 405) refuses."""
    body = error_body(error.status_code, str(error.detail), getattr(error, "param", None))
    return JSONResponse(body, error.status_code, error.headers)


def error_event(error: GatewayError) -> str:
    """The last event of a stream that ends with an error."""
    return f"data: {json.dumps(error_body(error.status_code, error.detail, error.param))}\n\n"
