# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, as dependencies of the routes: parsed, checked, validated."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, Request
from openai.types.chat import ChatCompletionMessageToolCallUnionParam
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from ..errors import GatewayError, Reason
from ..fail_fast import fail_fast, validator_of
from ..gateway import GatewayDep, RecordDep
from ..offload import off_the_loop
from ..places import Place, path_of
from ..schemas import ChatRequest, ResponsesBody, TextRequest
from ..security.grammars import check_repetitions
from ..validation import refusal

# Validation takes 1 us for each, in single calls that hold the interpreter lock.
_MAX_VALUES = 300_000
_MANY = 1000  # items of a prompt: with fewer, validation tells which one is wrong
_LARGE = 100_000  # bytes: parsing these takes 0.1 ms, as long as another thread takes to begin
_INTEGERS = range(-(2**63), 2**63)
_MAX_DIGITS = 300  # a double has no more
# Fields whose integers are a schema's, which may have larger ones.
_SCHEMAS = frozenset({"structured_outputs", "response_format", "tools", "text"})
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_A_PAIR = "the body has half of a surrogate pair, which is no character"

_CALLS = TypeAdapter(list[ChatCompletionMessageToolCallUnionParam])

_Model = TypeVar("_Model", bound=BaseModel)


async def _checked(request: Request, gateway: GatewayDep, record: RecordDep) -> AsyncIterator[Any]:
    raw = await request.body()
    body = await off_the_loop(_load, raw) if len(raw) > _LARGE else _load(raw)
    async with gateway.media.admit(body, record):
        yield body


CheckedBody = Annotated[Any, Depends(_checked)]
"""The parsed body, with its images and texts checked; the images are held until the answer ends."""


def _validated(model: type[_Model]) -> Callable[..., Coroutine[Any, Any, _Model]]:
    async def validated(body: CheckedBody, request: Request) -> _Model:
        large = len(await request.body()) > _LARGE
        return await off_the_loop(_validate, model, body) if large else _validate(model, body)

    return validated


def _validate(model: type[_Model], body: Any) -> _Model:
    if body is None:
        raise GatewayError(400, "the body is empty", reason=Reason.INVALID)
    try:
        found: _Model = validator_of(model).validate_python(body, from_attributes=True)
    except (ValidationError, AttributeError, LookupError, TypeError) as error:
        _validate_lists(body)
        if isinstance(error, ValidationError):
            raise refusal(error, body) from None
        # vLLM's validators read fields before the types of these are checked.
        raise _field_at_fault(model, body) from None
    except VLLMValidationError as error:
        raise GatewayError(
            400, error.args[0], reason=Reason.INVALID, param=error.parameter
        ) from None
    if isinstance(found, ChatRequest):
        _validate_parts(found, body)
    return found


def _field_at_fault(model: type[BaseModel], body: Any) -> GatewayError:
    """The refusal of the first field that is wrong by itself."""
    for name, field in model.model_fields.items():
        if name in body:
            try:
                fail_fast(TypeAdapter[Any](field.annotation or Any).core_schema).validate_python(
                    body[name]
                )
            except ValidationError as error:
                return refusal(error, body, (name,))
    text = "the body has a field of a wrong type"
    return GatewayError(400, text, reason=Reason.INVALID)


def _validate_lists(body: Any) -> None:
    """Validate tools and tool calls, of which vLLM's own errors do not tell where they are.

    Raises:
        GatewayError: HTTP 400.
    """
    tools = body.get("tools") if isinstance(body, dict) else None
    if tools is not None and not isinstance(tools, list):
        raise GatewayError(400, "tools must be an array", reason=Reason.INVALID, param="tools")
    messages = body.get("messages") if isinstance(body, dict) else None
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        try:
            _CALLS.validate_python(calls or [])
        except ValidationError as error:
            raise refusal(error, body, ("messages", index, "tool_calls")) from None


def _validate_parts(request: ChatRequest, body: Any) -> None:
    """Validate content parts, which pydantic would do while vLLM reads them.

    Raises:
        GatewayError: HTTP 400.
    """
    for index, message in enumerate(request.messages):
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str | list):
            continue
        try:
            message["content"] = list(content)
        except ValidationError as error:
            raise refusal(error, body, ("messages", index, "content")) from None


ChatBody = Annotated[ChatRequest, Depends(_validated(ChatRequest))]
TextBody = Annotated[TextRequest, Depends(_validated(TextRequest))]
ResponsesBodyDep = Annotated[ResponsesBody, Depends(_validated(ResponsesBody))]


def _load(raw: bytes) -> Any:
    body = _parse(raw)
    check_repetitions(body)
    if isinstance(body, dict):
        _check_prompt(body.get("prompt"))
    return body


def _check_prompt(prompt: Any) -> None:
    """Refuse a long prompt of mixed types, which takes validation twenty times as long.

    Raises:
        GatewayError: HTTP 400.
    """
    for part in (prompt, *prompt) if isinstance(prompt, list) else ():
        many = isinstance(part, list) and len(part) > _MANY
        if many and set(map(type, part)) not in ({int}, {str}, {list}):
            text = "prompt must be a string or token ids, or an array of one of these"
            raise GatewayError(400, text, reason=Reason.INVALID, param="prompt")


def _parse(raw: bytes) -> Any:
    """JSON within what the engine can take: it would fail on anything else, as our error.

    Raises:
        GatewayError: HTTP 400 or 413.
    """
    # Megabytes of small values, unlike text and images, block the event loop for seconds.
    if len(raw) > _MAX_VALUES and _num_values(raw) > _MAX_VALUES:
        text = f"the body has more than {_MAX_VALUES} values"
        raise GatewayError(413, text, reason=Reason.BODY_VALUES)
    if not raw:
        return None
    try:
        text = _decode(raw)
        large: list[int] = []
        body = json.loads(
            text, parse_constant=_refuse_constant, parse_int=partial(_integer, large=large)
        )
        if large and isinstance(body, dict | list):
            _settle_large(body)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(body, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        text = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise GatewayError(400, text, reason=Reason.INVALID) from None
    except UnicodeEncodeError:
        raise GatewayError(400, _HALF_A_PAIR, reason=Reason.INVALID) from None
    except RecursionError:
        raise GatewayError(400, "the body nests too deeply", reason=Reason.INVALID) from None
    return body


def _decode(raw: bytes) -> str:
    """The text of a body. `json.loads` would take bytes of half a surrogate pair."""
    encoding = json.detect_encoding(raw)
    message = _HALF_A_PAIR
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        try:
            raw.decode(encoding, "surrogatepass")
        except UnicodeDecodeError:
            message = "the body is not UTF-8"
    raise GatewayError(400, message, reason=Reason.INVALID)


def _num_values(raw: bytes) -> int:
    # bytes.count takes ten times as long if there are many.
    return int(np.count_nonzero(np.frombuffer(raw, np.uint8) == ord(",")))


def _refuse_constant(name: str) -> Any:
    raise GatewayError(400, f"{name} is not JSON", reason=Reason.INVALID)


class _Large(int):
    """An integer that most of vLLM can't take: the engine's messages have 64 bits for it."""


def _integer(digits: str, large: list[int]) -> int:
    if len(digits) > _MAX_DIGITS:
        raise GatewayError(400, f"{digits[:32]}... is too large a number", reason=Reason.INVALID)
    value = int(digits)
    if value in _INTEGERS:
        return value
    large.append(_Large(value))
    return large[-1]


def _settle_large(body: Any) -> None:
    """Make large integers of schemas numbers that the engine takes, and refuse all others.

    Raises:
        GatewayError: HTTP 400, with the path of the integer.
    """
    rest: list[tuple[Place | None, Any, bool]] = [(None, body, False)]
    while rest:
        place, node, in_schema = rest.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            is_schemas = in_schema or (place is None and key in _SCHEMAS)
            if isinstance(value, dict | list):
                rest.append(((place, key), value, is_schemas))
            elif isinstance(value, _Large) and is_schemas:
                node[key] = int(value) if 0 < value < 2**64 else float(value)
            elif isinstance(value, _Large):
                path = path_of((place, key))
                text = f"{path} must be an integer in [{_INTEGERS[0]}, {_INTEGERS[-1]}]"
                raise GatewayError(400, text, reason=Reason.INVALID, param=path)
