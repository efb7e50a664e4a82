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
from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

_DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,", re.IGNORECASE)

# Whatever a part's `type` says, vLLM may take it for what its keys say.
_MEDIA_KEYS = frozenset(MM_PARSER_MAP) - TEXT_PART_TYPES - {"image_url"}


def check_media(messages: Sequence[Any]) -> None:
    """Refuse media other than pictures as data URLs.

    Raises:
        VLLMValidationError: HTTP 400.
    """
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            continue
        # Validation may leave an iterator that can be read once; the handler needs it, too.
        content = message["content"] = list(content)
        if not all(_is_allowed(part) for part in content):
            raise VLLMValidationError(
                "media must be pictures, in image_url parts with a data URL: "
                "data:image/png;base64,... (or jpeg, webp, gif)",
                parameter=f"messages[{index}].content",
            )


def _is_allowed(part: Any) -> bool:
    if not isinstance(part, dict):
        return True
    if not _MEDIA_KEYS.isdisjoint(part) or part.get("type") in _MEDIA_KEYS:
        return False
    if "image_url" not in part and part.get("type") != "image_url":
        return True
    picture = part.get("image_url")
    url = picture.get("url") if isinstance(picture, dict) else picture
    return isinstance(url, str) and _DATA_URL.match(url) is not None
