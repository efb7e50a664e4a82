# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's shape."""

from __future__ import annotations

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


class GatewayError(HTTPException):
    """A request that the gateway refuses.

    Attributes:
        reason: why, as a word for logs and metrics (the metric's label: a fixed, small set).
        param: the field of the request that is at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"retry-after": str(retry_after)}
        super().__init__(status, message, headers)
        self.reason = reason
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: HTTPException) -> JSONResponse:
    """The answer to a request that is refused, by us or by the router (404, 405)."""
    body = error_body(error.status_code, str(error.detail), getattr(error, "param", None))
    return JSONResponse(body, error.status_code, error.headers)


def error_event(error: GatewayError) -> str:
    """The end of a stream that can't go on."""
    return f"data: {json.dumps(error_body(error.status_code, error.detail, error.param))}\n\n"
