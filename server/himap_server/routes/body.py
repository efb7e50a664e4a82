# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, as dependencies of the routes: parsed, checked, validated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from openai.types.chat import ChatCompletionMessageToolCallUnionParam
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from ..error_fields import field_of
from ..errors import GatewayError, Reason
from ..fail_fast import fail_fast, validator_of
from ..gateway import GatewayDep, RecordDep
from ..offload import off_the_loop
from ..schemas import ChatRequest, ResponsesBody, TextRequest
from ..security.grammars import check_repetitions
from ..validation import refusal
from .parsing import INTEGERS, parse

_MANY = 1000  # items of a prompt: with fewer, validation tells which one is wrong
_LARGE = 100_000  # bytes: parsing these takes 0.1 ms, as long as another thread takes to begin

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
            400,
            error.args[0],
            reason=Reason.INVALID,
            param=field_of(error.args[0], error.parameter, model, body),
        ) from None
    _check_integers(found, body)
    if isinstance(found, ChatRequest):
        _validate_parts(found, body)
    return found


def _check_integers(found: BaseModel, body: Any) -> None:
    """Refuse integers that the engine can't take, in fields of integers.

    Raises:
        GatewayError: HTTP 400.
    """
    for name, value in body.items() if isinstance(body, dict) else ():
        if type(value) is int and value not in INTEGERS and name in type(found).model_fields:
            if not isinstance(vars(found)[name], int):  # getattr warns of deprecated ones
                continue
            text = f"{name} must be an integer in [{INTEGERS[0]}, {INTEGERS[-1]}]"
            raise GatewayError(400, text, reason=Reason.INVALID, param=name)


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
    body = parse(raw)
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
