# SPDX-License-Identifier: Apache-2.0
"""Answers of the Responses API in the shape of the Open Responses specification.

https://www.openresponses.org/specification

* `vllm.entrypoints.openai.responses.protocol.ResponsesResponse` (read): it (0.32) lacks fields that
  the specification requires, and has null where that allows none. Remove when: vLLM passes the
  suite of the specification.
"""

from __future__ import annotations

import time
from typing import Any

from .schemas import ResponsesBody

_LISTS = ("annotations", "logprobs")


def complete_response(response: dict[str, Any], asked: ResponsesBody) -> None:
    """Complete a response object in place."""
    done = response.get("status") == "completed"
    response.update(
        completed_at=int(time.time()) if done else None,
        error=response.get("error"),
        text=_text(response.get("text")),
        store=False,
        safety_identifier=_given(asked, "safety_identifier"),
        prompt_cache_key=asked.prompt_cache_key,
        metadata=response.get("metadata") or {},
        top_logprobs=response.get("top_logprobs") or 0,
    )
    if asked.top_p == 0:
        response["top_p"] = 0.0  # it runs as another setting, see schemas.py
    for item in response.get("output") or ():
        complete_item(item)


def complete_event(event: dict[str, Any], asked: ResponsesBody) -> None:
    """Complete an event of a stream in place."""
    if isinstance(event.get("response"), dict):
        complete_response(event["response"], asked)
    for key in ("item", "part"):
        if isinstance(event.get(key), dict):
            complete_item(event[key])


def complete_item(item: dict[str, Any]) -> None:
    """Complete an output item, or a part of its content, in place."""
    if item.get("type") == "output_text":
        for name in _LISTS:
            item[name] = item.get(name) or []
    for key in [key for key, value in item.items() if value is None]:
        del item[key]
    for part in item.get("content") or ():
        complete_item(part)


def _text(given: Any) -> dict[str, Any]:
    text = {key: value for key, value in (given or {}).items() if value is not None}
    form = text.setdefault("format", {"type": "text"})
    if form["type"] == "json_schema":
        form["strict"] = bool(form.get("strict"))
    return text


def _given(asked: ResponsesBody, name: str) -> str | None:
    """A field that vLLM's schema does not have."""
    value = (asked.model_extra or {}).get(name)
    return value if isinstance(value, str) else None
