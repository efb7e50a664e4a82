# SPDX-License-Identifier: Apache-2.0
"""Control characters in every field of a body, and what a server answers to each."""

from __future__ import annotations

from typing import Any

# All of them, a separator of lines beyond ASCII, and what would be a line of the log.
CONTROLS = "".join(map(chr, (*range(32), 127, 133, 0x2028))) + '\n{"forged": 1}\n'
CONTROLLED: dict[str, tuple[str, dict[str, Any], int]] = {
    "prompt": ("/v1/completions", {"prompt": CONTROLS}, 200),
    "stop": ("/v1/completions", {"prompt": "a", "stop": [CONTROLS]}, 200),
    "user": ("/v1/completions", {"prompt": "a", "user": CONTROLS}, 200),
    "request_id": ("/v1/completions", {"prompt": "a", "request_id": CONTROLS}, 200),
    "unknown field": ("/v1/completions", {"prompt": "a", CONTROLS: CONTROLS}, 200),
    "model": ("/v1/completions", {"prompt": "a", "model": CONTROLS}, 404),
    "wrong value": ("/v1/completions", {"prompt": "a", "temperature": CONTROLS}, 400),
    "content": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "name": CONTROLS, "content": CONTROLS}]},
        200,
    ),
    "role": ("/v1/chat/completions", {"messages": [{"role": CONTROLS, "content": "a"}]}, 200),
    "image": (
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"http://{CONTROLS}"}}],
                }
            ]
        },
        400,
    ),
    "metadata": (
        "/v1/responses",
        {"input": "a", "metadata": {CONTROLS: CONTROLS}, "max_output_tokens": 1},
        200,
    ),
    "id": (
        "/v1/responses",
        {"input": "a", "previous_response_id": CONTROLS, "max_output_tokens": 1},
        404,
    ),
    "path": ("/v1/completions/%00%0A%0D%1B", {}, 404),
}
