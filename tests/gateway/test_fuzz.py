# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody means well: generated from the app's own document, and hostile by hand.

Whatever is sent, the answer is one that the document names, errors have OpenAI's shape and tell
nothing of the server's inside, and the next request is answered.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.checkpoints import IMAGE_ID
from tests.gateway.hostile import (
    BODIES,
    CHAT,
    CONTENT_TYPES,
    FIELDS,
    GOOD,
    IMAGE_URLS,
    RESPONSES,
    TEXT,
    user,
    with_schema,
)
from tests.gateway.images import ImageHost
from tests.gateway.support import post
from tests.servers import Server, picture_message

GETS = (
    "/v1/models", "/v1/models/{model_id}",
    "/version", "/health", "/health/live", "/health/ready", "/load",
        "/metrics",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("goes_on")

# What must not be read in an error: addresses, files of the server, its stack, pydantic's words. A
# "0x" that a generated request says itself is none.
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
INSIDE = (
    "Traceback", "site-packages", '.py"', "/tmp", "/usr", "object at", "127.0.0.1",
    "ydantic", "input_value", "validation error",
)  # fmt: skip


TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def assert_refused(status: int, body: Any, statuses: Any = range(400, 500)) -> None:
    assert status in statuses
    assert status != 422
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == TYPES.get(status, "invalid_request_error")
    assert body["error"]["message"]
    code, param = body["error"]["code"], body["error"]["param"]
    assert code is None or isinstance(code, str)
    assert param is None or not param.startswith("body")
    assert not any(word in body["error"]["message"] for word in INSIDE)
    assert not ADDRESS.search(body["error"]["message"])


# Generated


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_operations_are_those_that_are_tested(document: Any) -> None:
    operations = {(method, path) for path in document for method in document[path]}
    assert operations == {("post", path) for path in GOOD} | {("get", path) for path in GETS}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", GOOD)
def test_generated_requests(
    document: Any, image_host: ImageHost, path: str, mode: schemathesis.GenerationMode
) -> None:
    # By strategy and not by schemathesis' own decorators: those, as of 4.32, break with pytest 9.
    cases = document[path]["post"].as_strategy(generation_mode=mode)
    reached = set()

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.booleans())
    def send(case: Any, with_good: bool) -> None:
        if isinstance(case.body, dict):
            case.body = _tamed(case.body, path, with_good, image_host)
        response = case.call(timeout=60)
        reached.add(response.status_code)
        case.validate_response(
            response,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )
        if response.status_code != 200:
            assert_refused(response.status_code, response.json())

    send()
    # If all were refused at the door, or none, little would have been tested.
    positive = mode is schemathesis.GenerationMode.POSITIVE
    assert reached >= ({200, 400} if positive else {400})


@pytest.mark.parametrize("path", GETS)
def test_generated_gets(document: Any, path: str) -> None:
    @settings(max_examples=5, derandomize=True, database=None, deadline=None)
    @given(document[path]["get"].as_strategy())
    def send(case: Any) -> None:
        case.call_and_validate(
            checks=[not_a_server_error, status_code_conformance, content_type_conformance],
            timeout=60,
        )

    send()


def test_the_documented_examples_work(server: Server, image_host: ImageHost) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as response:
        document = json.load(response)
    for path in GOOD:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        for example in content["examples"].values():
            body = {**_at_home(example["value"], image_host), "model": "tiny"}
            status, _, answer = post(server, path, body)
            assert (status, answer.get("error")) == (200, None)


def _tamed(body: dict[str, Any], path: str, with_good: bool, host: ImageHost) -> dict[str, Any]:
    """The body with a model that exists, work for seconds and not minutes, and local addresses."""
    body = {**_at_home(body, host), "model": "tiny"}
    if with_good:  # else most of what is generated would stop at a message that makes no sense
        body |= GOOD[path]
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body.setdefault(limit, 4)
    for name, most in ((limit, 4), ("max_completion_tokens", 4), ("n", 2), ("best_of", 2)):
        if isinstance(body.get(name), int | float) and body[name] > most:
            body[name] = most  # the large ones are sent by hand, below
    return body


def _at_home(node: Any, host: ImageHost) -> Any:
    """The same with every URL one of ours: tests must not fetch from the internet."""
    if isinstance(node, dict):
        return {key: _at_home(value, host) for key, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value, host) for value in node]
    if isinstance(node, str) and node.lower().startswith(("http:", "https:")):
        return host.url("0.png")
    return node


# The hostile catalogue


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_hostile_bodies(server: Server, path: str, body: bytes) -> None:
    status, _, answer = post(server, path, body)
    assert_refused(status, answer, {400})


NUMBERS = [
    (name, literal)
    for name in (
        "temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "frequency_penalty",
        "priority", '{"deep_ratio":%s}', '{"5":%s}',
    )
    for literal in ("NaN", "Infinity", "-Infinity", "1e308", "1" + "0" * 31)
    if name != '{"5":%s}' or not literal.startswith("1")  # a bias may be any number
]  # fmt: skip


@pytest.mark.parametrize(("name", "literal"), NUMBERS)
def test_hostile_numbers(server: Server, name: str, literal: str) -> None:
    """NaN and the infinities are Python's; JSON has none."""
    value = name % literal if "%" in name else literal
    name = {'{"deep_ratio":%s}': "himap", '{"5":%s}': "logit_bias"}.get(name, name)
    for path in (CHAT, TEXT):
        good = {key: field for key, field in GOOD[path].items() if key != name}
        body = f'{json.dumps(good)[:-1]}, "{name}": {value}}}'
        status, _, answer = post(server, path, body.encode())
        assert_refused(status, answer, {400})


@pytest.mark.parametrize("kind", CONTENT_TYPES)
def test_other_content_types(server: Server, kind: str) -> None:
    status, _, answer = post(server, CHAT, GOOD[CHAT], **{"content-type": kind})
    assert_refused(status, answer, {415})


@pytest.mark.parametrize(
    ("path", "fields"),
    FIELDS,
    ids=[f"{path[4:]}-{ascii(fields)[:60]}" for path, fields in FIELDS],
)
def test_hostile_fields(server: Server, path: str, fields: dict[str, Any]) -> None:
    status, _, answer = post(server, path, {**GOOD[path], **fields})
    assert_refused(status, answer, {400, 404})


@pytest.mark.parametrize("url", IMAGE_URLS)
def test_hostile_image_urls(server: Server, url: Any) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    status, _, answer = post(server, CHAT, {**GOOD[CHAT], **user(content)})
    assert_refused(status, answer, {400, 403})


@pytest.mark.parametrize("path", GOOD)
def test_hostile_fields_of_a_stream(server: Server, path: str) -> None:
    """An error is still a status, and not a 200 with an error in the stream."""
    for fields in ({"himap": {"deep_ratio": 0.95}}, {"top_k": 10**31}, {"model": "x"}):
        status, _, answer = post(server, path, {**GOOD[path], **fields, "stream": True})
        assert_refused(status, answer, {400, 404})


@pytest.mark.parametrize(
    "fields",
    [
        user([{"type": "text", "text": "x"}] * 100),
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"structured_outputs": {"regex": "(a+)+$"}},
        {"structured_outputs": {"regex": "(a|a)*b"}},
        with_schema({"type": "string", "pattern": "(a+)+$"}),
        {"logit_bias": {str(IMAGE_ID): 100}},
        {"allowed_token_ids": [IMAGE_ID]},
        {"priority": -5},
        {"vllm_xargs": {"a": "x" * 100_000}},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "x", "remote_port": 1}},
        {"n": 16, "max_tokens": 16},
        {"x" * 1000: {}},
    ],
    ids=lambda fields: ascii(fields)[:60],
)
def test_odd_but_answered(server: Server, fields: dict[str, Any]) -> None:
    begun = time.monotonic()
    status, _, answer = post(server, CHAT, {**GOOD[CHAT], **fields})
    assert (status, answer.get("error")) == (200, None)
    assert time.monotonic() - begun < 30


def test_a_grammar_too_large_to_compile_in_time_is_refused(server: Server) -> None:
    fields = {"structured_outputs": {"regex": "((a{100}){100}){100}"}}
    status, _, answer = post(server, CHAT, {**GOOD[CHAT], **fields})
    if status != 200:  # a fast machine may well compile it
        assert_refused(status, answer, {400})


@pytest.mark.parametrize(
    "fields",
    [
        {"himap": {"deep_ratio": 0.95}},
        {"vllm_xargs": {"himap_x": 1}},
        {"temperature": -1},
        {"n": 1000},
        {"structured_outputs": {"regex": "("}},
        {"truncate_prompt_tokens": 10},
    ],
    ids=ascii,
)
def test_a_refused_request_leaves_its_image_usable(server: Server, fields: dict[str, Any]) -> None:
    """vLLM's cache of processed images has two halves, which a refusal in between sets at odds."""
    noise = Random(repr(fields)).randbytes(3 * 40 * 40)  # an image that no test has sent
    message = picture_message(Image.frombytes("RGB", (40, 40), noise), "What is this?")
    body = {**GOOD[CHAT], "messages": [message]}
    status, _, answer = post(server, CHAT, {**body, **fields})
    assert_refused(status, answer, {400})
    status, _, answer = post(server, CHAT, body)
    assert (status, answer.get("error")) == (200, None)
