# SPDX-License-Identifier: Apache-2.0
"""What the tests of clients ask for, and what all clients must get.

The model's weights are random and its answers greedy, so every client must come back with the same
text for the same image: that of a raw request. Pruning is asked for with other ratios than the
server's defaults, which the usage of each answer then shows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from tests.gateway.images import PICTURES
from tests.servers import picture_message

QUESTION = "What is this?"
DATA_URL: str = picture_message(PICTURES[0], QUESTION)["content"][0]["image_url"]["url"]
HIMAP = {"deep_ratio": 0}
KEPT_DEEP = 18  # 5 by default
NUM_TOKENS = 8
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0}
# Room for the spaces that a random model puts wherever JSON may have them.
ROOM = 200


class Paint(BaseModel):
    """Few enough answers that a random model gives one of them."""

    colour: Literal["red", "green", "blue"]
    large: bool


class Expected(NamedTuple):
    """The answer that all clients get to the first picture."""

    text: str
    responses_text: str
    usage: dict[str, Any]


def savings(usage: Any) -> dict[str, Any]:
    """`usage.himap` without what depends on earlier requests."""
    return {name: value for name, value in usage.items() if name != "cached_tokens"}


def chat_messages(url: str) -> Any:
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": QUESTION},
            ],
        }
    ]


def responses_input(url: str) -> Any:
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    return [{"role": "user", "content": content}]


def tool(**function: Any) -> Any:
    # Strict: the schema binds what the model writes.
    schema = {**Paint.model_json_schema(), "additionalProperties": False}
    function = {"name": "paint", "parameters": schema, "strict": True, **function}
    return {"type": "function", "function": function}
