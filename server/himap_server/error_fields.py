# SPDX-License-Identifier: Apache-2.0
"""The field of a request that an error of vLLM is about, by the name that clients have for it.

* `vllm.exceptions.VLLMValidationError` (read): its `parameter` is missing in half of vLLM's (0.32)
  checks, or names a field of `SamplingParams`. Messages begin with the field's name. Remove when:
  `parameter` names the field of the request in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from pydantic import BaseModel

# The first that the schema has, and of these the first that the request has.
_PROMPT = ("messages", "input", "prompt")
_CLIENTS = {
    "extra_args": ("vllm_xargs",),
    "input_text": _PROMPT,
    "input_tokens": _PROMPT,
    "prompt": _PROMPT,
    "logprobs": ("top_logprobs", "logprobs"),
    "max_pattern_size": ("repetition_detection",),
    "min_count": ("repetition_detection",),
    "max_tokens": ("max_output_tokens", "max_completion_tokens", "max_tokens"),
}
GRAMMARS = ("structured_outputs", "response_format", "text", "tools")
"""Fields that ask for a form of the answer."""
_OF_PROMPTS = re.compile(r"\bprompt\b|^Token id\b")
_OF_GRAMMARS = re.compile(r"grammar|schema|regex|(?<!tool_)choice|structur", re.IGNORECASE)


def field_of(
    message: str, parameter: str | None, model: type[BaseModel], given: Collection[str]
) -> str | None:
    """The name of the field, for `error.param`.

    Args:
        message: of the error.
        parameter: what the error itself says.
        model: the schema of the request.
        given: the fields that the request has.
    """
    fields = model.model_fields
    if parameter is not None:
        return _clients(parameter, fields, given) or parameter
    first = re.match(r"`?(\w+)", message)
    if first and (found := _clients(first[1], fields, given)):
        return found
    # Messages about grammars quote what clients wrote in them.
    if _OF_GRAMMARS.search(message) and (grammar := grammar_field(fields, given)):
        return grammar
    # Names of two words are no English; shorter ones stand in backticks.
    for word in re.findall(r"`(\w+)`|\b([a-z]+_[a-z_]+)\b", message):
        if found := _clients(word[0] or word[1], fields, given):
            return found
    return prompt_field(fields) if _OF_PROMPTS.search(message) else None


def prompt_field(fields: Collection[str]) -> str | None:
    """The field of a schema that the prompt is made of."""
    return _clients("prompt", fields, ())


def grammar_field(fields: Collection[str], given: Collection[str]) -> str | None:
    """The field by which a request asks for a form, if it is one field."""
    found = [name for name in GRAMMARS if name in fields and name in given]
    return found[0] if len(found) == 1 else None


def _clients(name: str, fields: Collection[str], given: Collection[str]) -> str | None:
    names = [client for client in _CLIENTS.get(name, (name,)) if client in fields]
    return next((client for client in names if client in given), next(iter(names), None))
