# SPDX-License-Identifier: Apache-2.0
"""What large bodies cost the event loop: little of their parsing and decoding happens on it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
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


def test_large_bodies_take_the_loop_no_time() -> None:
    raw = body_of(PHOTO)

    def parsing() -> float:
        begun = time.thread_time()
        _load(raw)
        return time.thread_time() - begun

    async def scenario() -> float:
        media = media_check()
        await take(raw, media)
        begun = time.thread_time()
        for parsed in await asyncio.gather(*[take(raw, media) for _ in range(16)]):
            image = parsed["messages"][0]["content"][0]["image_url"]["url"]
            assert image.startswith("himap-image:")
        return time.thread_time() - begun

    # Other processes take from the processor's caches, so one measurement decides nothing.
    ratios = [asyncio.run(scenario()) / (16 * parsing()) for _ in range(5)]
    assert min(ratios) < 1 / 3


def test_no_single_call_holds_the_interpreter_for_long() -> None:
    """The event loop waits for each: `json` takes 11 ms for a photo, `bytes.count` 6 ms."""
    raw = body_of(PHOTO)

    def best(call: Callable[[], object]) -> float:
        def once() -> float:
            begun = time.thread_time()
            call()
            return time.thread_time() - begun

        return min(once() for _ in range(7))

    assert best(lambda: _load(raw)) < 0.7 * best(lambda: json.loads(raw))
    assert best(lambda: num_scans(PHOTO)) < 0.7 * best(lambda: PHOTO.count(b"\xff\xda"))


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

    async def scenario() -> float:
        request: Any = SimpleNamespace(body=read)
        begun = time.thread_time()
        found: Any = await _validated(ChatRequest)(body, request)
        assert len(found.logit_bias) == 100_000
        return time.thread_time() - begun

    assert asyncio.run(scenario()) < 0.01


def test_a_large_integer_takes_no_memory_for_places() -> None:
    """A path for each of them would be 500 times the key."""
    raw = json.dumps({"k" * 1_000_000: [[]] * 500, "tools": [2**64]}).encode()
    tracemalloc.start()
    body = _load(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert body["tools"] == [float(2**64)]
    assert peak < 20 * len(raw)
