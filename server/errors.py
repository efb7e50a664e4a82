# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse


def error_response(
    status: int,
    message: str,
    *,
    type_: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """`{"error": {"message", "type", "param", "code"}}` with a status."""
    error = {"message": message, "type": type_, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=dict(headers or {}))
