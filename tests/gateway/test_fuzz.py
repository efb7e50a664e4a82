# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody means well: generated from the app's own document, and hostile by hand.

Whatever is sent, the answer is one that the document names, errors have OpenAI's shape and tell
nothing of the server's inside, and the next request is answered.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from himap_server.http import MAX_HEAD_BYTES
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
from tests.gateway.conftest import PICTURES, ImageHost
from tests.gateway.support import metric, post
from tests.servers import Server, picture_message

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PICTURE: Any = picture_message(PICTURES[0], "What is this?")
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [PICTURE], "max_tokens": 4},
    TEXT: {"model": "tiny", "prompt": "Once", "max_tokens": 4},
    RESPONSES: {"model": "tiny", "input": "Once", "max_output_tokens": 4},
}
GETS = ("/v1/models", "/version", "/health/live", "/health/ready", "/metrics")

# What must not be read in an error: addresses, files of the server, its stack.
INSIDE = ("0x", "Traceback", "site-packages", '.py"', "/tmp", "/usr", "object at", "127.0.0.1")


def assert_refused(status: int, body: Any, statuses: Any = range(400, 500)) -> None:
    assert status in statuses
    assert status != 422
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert body["error"]["message"]
    assert body["error"]["type"]
    assert not any(word in body["error"]["message"] for word in INSIDE)


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After every test of this module the server is ready and idle, and answers."""
    yield
    assert server.status("/health/ready") == 200
    status, _, body = post(server, CHAT, GOOD[CHAT])
    assert (status, body["usage"]["completion_tokens"] > 0) == (200, True)
    deadline = time.monotonic() + 30
    while metric(server, "himap_requests_in_flight"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
    # By strategy and not by schemathesis' own decorators: those, as of 4.32, break with pytest 9.2.
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


# By hand: bodies

_DEEP = 100_000
_TAIL = b',"messages":[{"role":"user","content":"x"}]}'
BODIES = {
    "empty": b"",
    "no-json": b"{",
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
    "binary": b"\xff\xfe\x00",
    "latin-1": b'{"model":"\xe4"' + _TAIL,
    "nested-arrays": b"[" * _DEEP,
    "nested-objects": b'{"a":' * _DEEP,
    "nested-and-closed": b'{"model":"tiny","x":' + b"[" * _DEEP + b"]" * _DEEP + _TAIL,
    "nested-messages": b'{"model":"tiny","messages":' + b"[" * 500 + b"]" * 500 + b"}",
    "long-number": b'{"model":"tiny","max_tokens":' + b"9" * 5000 + _TAIL,
    "beyond-double": b'{"model":"tiny","temperature":1e400' + _TAIL,
    "duplicate-key": b'{"himap":{"deep_ratio":0,"deep_ratio":2},"model":"tiny"' + _TAIL,
    "compressed": gzip.compress(b'{"model":"tiny"' + _TAIL),
}


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


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/jsonx", "x"],
)  # fmt: skip
def test_other_content_types(server: Server, kind: str) -> None:
    status, _, answer = post(server, CHAT, GOOD[CHAT], **{"content-type": kind})
    assert_refused(status, answer, {415})


# By hand: fields. Each is put over a good request, with an image for chat.

LONE = "\ud800"  # half of a surrogate pair: JSON can spell it, UTF-8 can't
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def _values(*values: Any) -> tuple[Any, ...]:
    return values


def _each(name: str, *values: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


def _with_schema(schema: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": schema}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


CHAT_FIELDS: list[dict[str, Any]] = [
    {"model": "x"},
    {"model": 5},
    {"model": LONE},
    {"model": "../tiny"},
    *_each("max_tokens", -1, 513, 10**30, "many"),
    *_each("n", 0, -1, 10**6, 1.5),
    *_each("seed", 10**31, "x"),
    *_each("temperature", -1, 3, "hot"),
    *_each("top_k", -2, 10**31),
    *_each("top_p", 0, -1, 1.1),
    *_each("min_tokens", -1, 10),
    {"repetition_penalty": 0},
    {"priority": 10**30},
    # Of strings
    *_each("stop", [f"x{index}" for index in range(1000)], [""], [LONE], 5),
    *_each("bad_words", [""], [LONE], [5]),
    *_each("logit_bias", {"a": 1}, {"999999": 1}, {"-1": 1}, [], {"1": None}),
    *_each("stop_token_ids", [-1], [10**30], ["a"]),
    *_each("allowed_token_ids", [], [-1], [10**6]),
    *_each("top_logprobs", -2, 10**6),
    *_each("prompt_logprobs", -2, 10**6),
    # Of messages
    *_each("messages", [], {}, "x", ["x"], [{}], [{"content": "x"}]),
    *map(_user, _values(None, 5, LONE, [["x"]], [{"type": "text"}], [{"type": "?"}])),
    _user("x" * 100_000),
    _user([{"type": "text", "text": 5}]),
    {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"role": LONE, "content": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": 5}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    {"messages": [PICTURE] * 17},
    {"messages": [PICTURE] * 16},  # longer than the model can take
    # Of tools
    *_each("tools", {}, "x", [{}], [{"type": "function"}], [{"type": "mcp"}]),
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
    {"tools": [_TOOL], "tool_choice": "?"},
    {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    {"tool_choice": "required"},
    *(
        {
            "tools": [{"type": "function", "function": {
                "name": "f", "strict": True, "parameters": schema,
            }}],
            "tool_choice": "required",
        }
        for schema in ({"type": "?"}, {"$ref": "#/nowhere"})
    ),
    # Of structured output
    *({"structured_outputs": {"regex": value}} for value in ("(", "a{", "(?=a)b", "\\1", LONE)),
    {"structured_outputs": {"regex": "(" * 2000 + ")" * 2000}},
    *map(_with_schema, _values({"type": "?"}, {"$ref": "#/x"}, {"enum": []}, 5, "x")),
    _with_schema({"type": "string", "pattern": "("}),
    _with_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    _with_schema(_nested(300)),
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"structural_tag": "{"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    *({"response_format": {"type": value}} for value in ("?", "json_schema", "structural_tag")),
    # Of vLLM
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"chat_template": "x"}},
    {"mm_processor_kwargs": {"size": {"height": 10**6, "width": 10**6}}},
    {"media_io_kwargs": {"image": {"a": 1}}},
    *_each("truncate_prompt_tokens", -5, 0, 10, 10**9),
    *_each("cache_salt", "", 5, "x" * 10**6, "a/b", "\0", LONE),
    {"use_beam_search": True},
    {"stream_options": {"include_usage": True}},  # without a stream
    # Of pruning
    *_each(
        "vllm_xargs",
        {"himap_x": 1}, {"himap_deep_ratio": 0.99}, {"himap_shallow_ratio": "a"},
        {"himap_shallow_ratio": [1]}, {"himap_deep_ratio": -1}, {LONE: 1}, {"a": {"b": 1}}, [],
    ),
    *_each("himap", {LONE: 1}, {"deep_ratio": 2}, {"x": 1}, [], 5),
]  # fmt: skip

TEXT_FIELDS: list[dict[str, Any]] = [
    *_each(
        "prompt",
        None, "", [], {}, 5, [[]], [1.5], [1, "a"], [[1], "a"], [[[5]]], LONE, "x" * 100_000,
        [-1], [10**6], [2**63], [[5], [10**6]], [5] * 600, [IMAGE_ID], [[1, IMAGE_ID]],
    ),
    *_each("logprobs", -1, 10**6),
    {"suffix": "x"},
    {"echo": "x"},
    {"n": 10**6},
]  # fmt: skip

RESPONSES_FIELDS: list[dict[str, Any]] = [
    *_each(
        "input",
        None, [], 5, ["x"], [None], LONE, [{"type": "message"}], [{"role": "user"}],
        [{"role": "user", "content": [{"type": "input_text"}]}],
        [{"role": "wizard", "content": "x"}],
        [{"type": "item_reference", "id": "x"}],
        [{"type": "message", "role": "assistant", "id": "x", "status": "completed",
          "content": []}],
    ),
    {"previous_response_id": "resp_x"},
    {"previous_response_id": LONE},
    {"background": True},
    {"prompt": {"id": "x"}},
    *_each("tools", 5, [{}], [{"type": "function"}]),
    *_each("tool_choice", "required", "?", {"type": "function", "name": "g"}),
    *_each("text", 5, {"format": {"type": "?"}}),
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}},
    *_each("max_output_tokens", 0, -1, 10**30),
    *_each("top_k", -2, 10**31),
    {"metadata": {"a": LONE}},
    {"instructions": LONE},
    {"user": LONE},
    {"include": ["?"]},
    {"truncation": "?"},
]  # fmt: skip

FIELDS = [
    (path, fields)
    for path, several in ((CHAT, CHAT_FIELDS), (TEXT, TEXT_FIELDS), (RESPONSES, RESPONSES_FIELDS))
    for fields in several
]


@pytest.mark.parametrize(
    ("path", "fields"),
    FIELDS,
    ids=[f"{path[4:]}-{ascii(fields)[:60]}" for path, fields in FIELDS],
)
def test_hostile_fields(server: Server, path: str, fields: dict[str, Any]) -> None:
    status, _, answer = post(server, path, {**GOOD[path], **fields})
    assert_refused(status, answer, {400, 404})


@pytest.mark.parametrize("path", GOOD)
def test_hostile_fields_of_a_stream(server: Server, path: str) -> None:
    """An error is still a status, and not a 200 with an error in the stream."""
    for fields in ({"himap": {"deep_ratio": 0.95}}, {"top_k": 10**31}, {"model": "x"}):
        status, _, answer = post(server, path, {**GOOD[path], **fields, "stream": True})
        assert_refused(status, answer, {400, 404})


@pytest.mark.parametrize(
    "fields",
    [
        _user([{"type": "text", "text": "x"}] * 100),
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"structured_outputs": {"regex": "(a+)+$"}},
        {"structured_outputs": {"regex": "(a|a)*b"}},
        _with_schema({"type": "string", "pattern": "(a+)+$"}),
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


# By hand: the connection


def _request(body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json",
        f"Content-Length: {len(body)}", *headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def _connection(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 30) as raw:
        yield raw


def _answers(raw: socket.socket, number: int) -> list[tuple[int, Any]]:
    answers = []
    # One buffer for all of them: HTTPResponse would keep what it read beyond its own.
    with raw.makefile("rb") as stream:
        for _ in range(number):
            status = int(stream.readline().split()[1])
            length = 0
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            answers.append((status, json.loads(stream.read(length))))
    return answers


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    good = json.dumps(GOOD[CHAT]).encode()
    with _connection(server) as raw:
        raw.sendall(_request(good) + _request(b"{") + _request(good))
        statuses = [status for status, _ in _answers(raw, 3)]
    assert statuses == [200, 400, 200]


def test_a_connection_closed_halfway(server: Server) -> None:
    """The client sends no more, and may yet listen: it gets its answer, or the request ends."""
    with _connection(server) as raw:
        raw.sendall(_request(json.dumps(GOOD[CHAT]).encode()))
        raw.shutdown(socket.SHUT_WR)
        received = raw.recv(1 << 16)
    assert received.startswith(b"HTTP/1.1 200") or not received


def test_a_body_that_is_never_complete(server: Server) -> None:
    with _connection(server) as raw:
        raw.sendall(_request(b'{"model":')[:-3])
        time.sleep(0.5)
        assert metric(server, "himap_requests_in_flight") == 1
    # `goes_on` waits for the request to end.


def test_a_body_in_small_pieces(server: Server) -> None:
    whole = _request(json.dumps({**GOOD[CHAT], "messages": [PICTURE]}).encode())
    with _connection(server) as raw:
        for start in range(0, len(whole), 500):
            raw.sendall(whole[start : start + 500])
            time.sleep(0.01)
        ((status, _),) = _answers(raw, 1)
    assert status == 200


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        (("X-Request-Id: " + "x" * 10_000,), {200}),
        (("Authorization: Bearer " + "x" * 10_000,), {200}),  # the server is open
        (("Authorization: \xff\xfe",), {200, 400}),
        (("X-Large: " + "x" * 200_000,), {400, 431}),
        (tuple(f"X-{index}: x" for index in range(20_000)), {400, 431}),
        (("Content-Length: 5",), {400}),  # a second one
        (("Transfer-Encoding: chunked",), {400}),  # beside a length: request smuggling
        (("Expect: 100-continue",), {100, 200}),
    ],
    ids=["id", "key", "binary", "large", "many", "two-lengths", "smuggling", "expect"],
)
def test_hostile_headers(server: Server, headers: tuple[str, ...], statuses: set[int]) -> None:
    address = urlsplit(server.url)
    connection = HTTPConnection(str(address.hostname), address.port, timeout=30)
    connection.connect()
    assert connection.sock is not None
    with contextlib.suppress(ConnectionError):  # it may be refused before all of it was sent
        connection.sock.sendall(
            _request(json.dumps(GOOD[CHAT]).encode(), *headers).decode("latin-1").encode("latin-1")
        )
    response = HTTPResponse(connection.sock)
    try:
        response.begin()
        status = response.status
    except ConnectionError:
        status = 400  # closed without a word
    finally:
        connection.close()
    assert status in statuses


@pytest.mark.parametrize("part", ["headers", "a header", "a name", "the path", "trailers"])
def test_what_never_ends_is_cut_off(server: Server, part: str) -> None:
    """From anyone, key or not: the parser keeps all of it."""
    start, endless = {
        "headers": (b"POST /v1/models HTTP/1.1\r\n", b"X: y\r\n"),
        "a header": (b"POST /v1/models HTTP/1.1\r\nX: ", b"y"),
        "a name": (b"POST /v1/models HTTP/1.1\r\n", b"X"),
        "the path": (b"POST /v1/", b"x"),
        "trailers": (
            b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"X: y\r\n",
        ),
    }[part]
    sent = 0
    with _connection(server) as raw:
        raw.sendall(start)
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                sent += raw.send(endless * (65536 // len(endless)))
    # What the parser took, and what lay in the sockets' buffers.
    assert MAX_HEAD_BYTES < sent < 16 << 20


def test_requests_without_end_in_one_connection(server: Server) -> None:
    """Their answers are not waited for: they are queued."""
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = 0
    with _connection(server) as raw, contextlib.suppress(ConnectionError):
        while sent < 64 << 20:
            sent += raw.send(request * 1000)
    assert sent < 16 << 20


def test_streams_that_are_left(server: Server) -> None:
    body = {**GOOD[CHAT], "max_tokens": 400, "ignore_eos": True, "stream": True}
    for _ in range(5):
        with _connection(server) as raw:
            raw.sendall(_request(json.dumps(body).encode()))
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 30
    while metric(server, "vllm:num_requests_running") or metric(server, "vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
