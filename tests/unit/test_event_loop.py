# SPDX-License-Identifier: Apache-2.0
"""What large bodies cost the event loop: little of their parsing and decoding happens on it."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from himap_server.checked_images import ImageStore
from himap_server.errors import GatewayError
from himap_server.fail_fast import validator_of
from himap_server.media import MediaCheck
from himap_server.record import RequestRecord
from himap_server.routes.body import _checked, _load, _validate, _validated
from himap_server.schemas import ChatRequest, ResponsesBody
from himap_server.security.containers import num_scans
from himap_server.security.images import ImageLimits
from pydantic import ValidationError

from tests.unit.image_files import encode

LIMITS = ImageLimits(max_bytes=20 << 20, max_pixels=1_000_000, min_side=8)
PHOTO = encode("JPEG") + b"\0" * (5_800_000)  # a photo's bytes, without the time to make one

PASS_ON = {
    *("_checked", "MediaCheck._check.<locals>.<genexpr>", "MediaCheck._get", "_is_data_url"),
    *("ImageStore.add", "str.strip"),
}
"""The gateway's functions that have megabytes on the event loop. They look at no more of them than
the beginning.
"""


def body_of(photo: bytes) -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()


async def take(raw: bytes, media: MediaCheck) -> Any:
    """The body as a route gets it."""

    async def body() -> bytes:
        return raw

    request: Any = SimpleNamespace(body=body)
    gateway: Any = SimpleNamespace(media=media)
    checked = asynccontextmanager(_checked)(request, gateway, RequestRecord("id", "POST"))
    async with checked as parsed:
        return parsed


def media_check() -> MediaCheck:
    return MediaCheck(ImageStore(10**9), LIMITS, 16, 10**9, 64 << 20, None)


@contextmanager
def handled() -> Iterator[set[str]]:
    """Names of the gateway's functions that this thread calls with megabytes of text or bytes, of
    `json`'s, and of methods of such objects.

    Not the time of it: that depends on who else uses the processor.
    """
    names: set[str] = set()

    def large(value: object) -> bool:
        return isinstance(value, str | bytes) and len(value) > 1_000_000

    def observe(frame: FrameType, event: str, called: Any) -> None:
        if event == "call" and any(map(large, frame.f_locals.values())):
            if frame.f_globals["__name__"].partition(".")[0] in ("himap_server", "json"):
                names.add(frame.f_code.co_qualname)
        elif event == "c_call" and large(getattr(called, "__self__", None)):
            names.add(called.__qualname__)

    sys.setprofile(observe)
    try:
        yield names
    finally:
        sys.setprofile(None)


def test_large_bodies_are_not_read_on_the_loop() -> None:
    raw = body_of(PHOTO)

    async def scenario() -> set[str]:
        media = media_check()
        with handled() as names:
            for parsed in await asyncio.gather(*[take(raw, media) for _ in range(4)]):
                image = parsed["messages"][0]["content"][0]["image_url"]["url"]
                assert image.startswith("himap-image:")
        return names

    with handled() as here:
        _load(raw)
    assert {"_load", "parse"} <= here
    assert asyncio.run(scenario()) == PASS_ON


def test_no_single_call_holds_the_interpreter_for_long() -> None:
    """The event loop waits for each: `json` takes 11 ms for a photo, `bytes.count` 6 ms."""
    raw = body_of(PHOTO)
    slow = {"loads", "bytes.count"}
    with handled() as names:
        json.loads(raw)
        PHOTO.count(b"\xff\xda")
    assert slow <= names
    with handled() as names:
        _load(raw)
        num_scans(PHOTO)
    assert names
    assert not slow & names


@pytest.mark.parametrize("size", [10, 5_000_000])
def test_refusals_of_bodies_of_any_size(size: int) -> None:
    raw = b'{"messages": "' + b"a" * size + b'", "x": NaN}'
    with pytest.raises(GatewayError, match="NaN is not JSON"):
        asyncio.run(take(raw, media_check()))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 5000},
        {"messages": [{"role": "user", "content": [1] * 5000}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}] * 5000}]},
        {"tools": [{}] * 5000},
        {"input": [{"role": "user", "content": ["a"] * 5000}]},
    ],
    ids=["messages", "content", "calls", "tools", "input"],
)
def test_items_of_any_type_are_counted(body: Any) -> None:
    with pytest.raises(GatewayError, match="more than 4096") as error:
        asyncio.run(take(json.dumps(body).encode(), media_check()))
    assert (error.value.status_code, error.value.param) == (400, next(iter(body)))


@pytest.mark.parametrize(
    "prompt",
    [[True] * 5000, [1] * 5000 + ["a"], [[1], [1] * 5000 + [True]], [None] * 5000],
    ids=["booleans", "mixed", "nested", "nulls"],
)
def test_long_prompts_have_items_of_one_type(prompt: Any) -> None:
    with pytest.raises(GatewayError, match="prompt must be") as error:
        _load(json.dumps({"prompt": prompt}).encode())
    assert (error.value.status_code, error.value.param) == (400, "prompt")


def test_too_many_values_are_not_parsed() -> None:
    with pytest.raises(GatewayError, match="more than 300000 values") as error:
        _load(json.dumps({"prompt": [1] * 300_002}).encode())
    assert error.value.status_code == 413


def many_errors(num_parts: int, num_annotations: int) -> dict[str, Any]:
    """A body in which pydantic finds 18 errors for each annotation."""
    part = {"type": "output_text", "text": "a", "annotations": [{}] * num_annotations}
    item = {"type": "message", "role": "user", "id": "x", "content": [part] * num_parts}
    return {"input": [{**item, "status": "completed"}]}


def test_validation_stops_at_the_first_wrong_item() -> None:
    counts = []
    for body in (many_errors(2, 2), many_errors(50, 50)):
        with pytest.raises(ValidationError) as error:
            validator_of(ResponsesBody).validate_python(body, from_attributes=True)
        counts.append(error.value.error_count())
    assert counts[0] == counts[1] < 1000
    with pytest.raises(GatewayError, match=r"input\[0\]\.role must be 'assistant'"):
        _validate(ResponsesBody, many_errors(50, 50))


def test_large_bodies_are_validated_off_the_loop() -> None:
    message = {"role": "user", "content": "a"}
    body = {"messages": [message], "logit_bias": {str(n): 1 for n in range(100_000)}}
    raw = json.dumps(body).encode()

    async def read() -> bytes:
        return raw

    async def scenario() -> set[str]:
        request: Any = SimpleNamespace(body=read)
        called: set[str] = set()
        sys.setprofile(lambda frame, _event, _called: called.add(frame.f_code.co_qualname))
        try:
            found: Any = await _validated(ChatRequest)(body, request)
        finally:
            sys.setprofile(None)
        assert len(found.logit_bias) == 100_000
        return called

    called = asyncio.run(scenario())
    assert "off_the_loop" in called
    assert "_validate" not in called


def test_a_large_integer_takes_no_memory_for_places() -> None:
    """A path for each of them would be 500 times the key."""
    raw = json.dumps({"k" * 1_000_000: [[]] * 500, "tools": [2**64]}).encode()
    tracemalloc.start()
    body = _load(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert body["tools"] == [float(2**64)]
    assert peak < 20 * len(raw)
