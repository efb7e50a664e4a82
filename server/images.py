# SPDX-License-Identifier: Apache-2.0
"""Which media a request may carry: pictures as data URLs.

vLLM fetches any URL that it is given, whatever host it names. Until the gateway fetches pictures
itself, with the checks that takes, it hands none on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

_DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,", re.IGNORECASE)


def check_media(messages: Sequence[Any]) -> None:
    """Raise VLLMValidationError (HTTP 400) for media other than pictures as data URLs."""
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            kind = part.get("type") or next((key for key in part if key.endswith("_url")), "text")
            if kind == "text":
                continue
            picture = part.get("image_url")
            url = picture.get("url") if isinstance(picture, dict) else picture
            if kind != "image_url" or not isinstance(url, str) or not _DATA_URL.match(url):
                raise VLLMValidationError(
                    "pictures must be image_url parts with a data URL: "
                    "data:image/png;base64,... (or jpeg, webp, gif)",
                    parameter=f"messages[{index}].content",
                )
