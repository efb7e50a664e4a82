# SPDX-License-Identifier: Apache-2.0
"""One log line per request: who sent it, its result and its times, but never its content.

With the JSON formatter (the gateway's default) every field is a key of the line's object.
"""

from __future__ import annotations

import logging
from typing import Any

from .record import RequestRecord

# A child of vLLM's logger: it has that logger's level, format and handler.
logger = logging.getLogger("vllm.himap.request")


def log_request(record: RequestRecord) -> None:
    """Write the line of a request that has ended."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "key": record.key.name if record.key is not None else None,
        "status": record.status,
        "reason": record.reason,
        "stream": record.stream,
        "images": record.images,
        "prompt_tokens": record.prompt_tokens,
        "prompt_image_tokens": record.image_tokens,
        "prompt_text_tokens": record.prompt_tokens - record.image_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "himap": record.usage(),
        "duration_s": _rounded(record.duration),
        "overhead_s": _rounded(record.overhead),
        "image_fetch_s": _rounded(record.fetching),
        "image_decode_s": _rounded(record.decoding),
        "queue_s": _rounded(record.queued),
        "time_to_first_token_s": _rounded(record.time_to_first_token),
        "time_per_output_token_s": _rounded(record.time_per_output_token),
    }
    logger.info("%s %s %d", record.method, record.route or "-", record.status, extra=fields)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
