# SPDX-License-Identifier: Apache-2.0
"""Messages that clients send back to us, in the one form of each that vLLM reads in full.

* `vllm.entrypoints.openai.responses.utils.construct_input_messages` (called): vLLM's handler gives
  it the items. It reads the first part only of an assistant's message, and fails if that is a
  refusal or if there is none. Validation refuses such a message without `type`, as SDKs send it.
  Remove when: vLLM reads every part of a message.
"""

from __future__ import annotations

from typing import Any

_TEXTS = {"output_text": "text", "input_text": "text", "text": "text", "refusal": "refusal"}


def settle_messages(messages: Any) -> None:
    """Messages of the chat API, in place: what an assistant refused with is what it said."""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        refusal = message.get("refusal")
        if isinstance(refusal, str) and not message.get("content"):
            message["content"] = refusal


def settle_items(items: Any) -> None:
    """Input items of the Responses API, in place: an assistant's message has one part, its text."""
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict) or item.get("role") != "assistant":
            continue
        if item.get("type", "message") != "message" or not isinstance(item.get("content"), list):
            continue
        texts = [_text(part) for part in item["content"]]
        if None not in texts:
            text = "".join(str(text) for text in texts)
            item["type"] = "message"
            item["content"] = [{"type": "output_text", "text": text, "annotations": []}]


def _text(part: Any) -> str | None:
    """The text of a content part; None if it is no text."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return None
    text = part.get(_TEXTS.get(part["type"], ""))
    return text if isinstance(text, str) else None
