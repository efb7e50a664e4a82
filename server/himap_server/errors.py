# SPDX-License-Identifier: Apache-2.0
"""Refusals, and errors in OpenAI's shape."""

from __future__ import annotations

import enum
import json
import re
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

# OpenAI's words: its SDKs have an exception for each.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Index of a list in pydantic's paths.
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


class Reason(enum.StrEnum):
    """Why a request was not answered.

    The log has it as `reason`, and it is a label of `himap_refused_requests_total`. docs/gateway.md
    says what each means.
    """

    KEY = "key"
    RATE = "rate"
    CONCURRENCY = "concurrency"
    LIMITS = "limits"
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
    IMAGE_UUID = "image_uuid"
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


# `error.code`, where OpenAI has one: of its API, and of `ResponseError` in its document.
_CODES = {
    Reason.KEY: "invalid_api_key",
    Reason.RATE: "rate_limit_exceeded",
    Reason.CONCURRENCY: "rate_limit_exceeded",
    Reason.PROMPT_TOKENS: "context_length_exceeded",
    Reason.IMAGE_URL: "invalid_image_url",
    Reason.IMAGE_UUID: "image_file_not_found",
    Reason.IMAGE_HOST: "invalid_image_url",
    Reason.IMAGE_FETCH: "failed_to_download_image",
    Reason.IMAGE_TYPE: "unsupported_image_media_type",
    Reason.IMAGE_BYTES: "image_file_too_large",
    Reason.IMAGE_PIXELS: "image_too_large",
    Reason.IMAGE_SIDE: "image_too_small",
    Reason.IMAGE_BROKEN: "image_parse_error",
}


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


def error_body(
    status: int, message: str, param: str | None = None, reason: Reason | None = None
) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; `code` is OpenAI's word, or null."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    code = None if reason is None else _CODES.get(reason)
    if (status, param) == (404, "model"):
        code = "model_not_found"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def param_of(path: str | None) -> str | None:
    """`error.param` of a path by which pydantic names a field; None for the body itself.

    >>> param_of("body.messages.0.content")
    'messages[0].content'
    """
    if path is None or path == "body" or re.fullmatch(r"body\.\d+", path):  # a place in the text
        return None
    return _INDEX.sub(r"[\1]", path.removeprefix("body."))


def body_of(error: HTTPException) -> dict[str, Any]:
    """The body of the answer to a request that the gateway or the router (404, 405) refuses."""
    param, reason = getattr(error, "param", None), getattr(error, "reason", None)
    return error_body(error.status_code, str(error.detail), param, reason)


def error_response(error: HTTPException) -> JSONResponse:
    """The answer with that body."""
    return JSONResponse(body_of(error), error.status_code, error.headers)


def error_event(body: dict[str, Any], sequence_number: int | None = None) -> str:
    """The last event of a stream that ends with an error.

    Args:
        body: an `error_body`.
        sequence_number: of this event, if it is a stream of the Responses API. OpenAI has the parts
            of its error in the event itself, Open Responses in `error`.
    """
    if sequence_number is None:
        return f"data: {_dumps(body)}\n\n"
    error = body["error"]
    fields = {name: error[name] for name in ("message", "param", "code")}
    event = {"type": "error", "sequence_number": sequence_number, **fields, **body}
    return f"event: error\ndata: {_dumps(event)}\n\n"


def _dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))
