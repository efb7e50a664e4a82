# SPDX-License-Identifier: Apache-2.0
"""What clients, proxies and probes expect of HTTP: paths, methods, headers."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection, HTTPMessage
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import vllm

import himap_vllm
from tests.gateway.conftest import ORIGIN
from tests.gateway.hostile import CHAT, GOOD, OUT_OF_RANGE, RESPONSES, TEXT
from tests.gateway.support import client, post
from tests.servers import Server


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, HTTPMessage, bytes]:
    """Status, headers and body. The path is sent as it is."""
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def test_one_model(server: Server) -> None:
    assert client(server).models.retrieve("tiny").id == "tiny"
    listed = json.loads(ask(server, "GET", "/v1/models")[2])["data"][0]
    card = json.loads(ask(server, "GET", "/v1/models/tiny/")[2])
    assert (card["root"], card["max_model_len"]) == (listed["root"], 512)
    for name in ("gone", "a/b", "tiny/tiny", "x" * 1000):
        with pytest.raises(openai.NotFoundError) as error:
            client(server).models.retrieve(name)
        assert (error.value.param, error.value.code) == ("model", "model_not_found")
        assert f"`{name[:256]}`" in error.value.message


def test_version_and_health(server: Server) -> None:
    version = json.loads(ask(server, "GET", "/version")[2])
    assert version == {"version": himap_vllm.__version__, "vllm": vllm.__version__}
    for path in ("/health", "/health/ready"):
        status, _, body = ask(server, "GET", path)
        assert (status, json.loads(body)) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/v1/models", "/v1/models/tiny", "/version", "/docs"]
)
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    status, headers, body = ask(server, "HEAD", path)
    assert (status, body) == (200, b"")
    got = ask(server, "GET", path)
    for name in ("content-type", "content-length"):
        assert headers[name] == got[1][name]


def test_head_elsewhere(server: Server) -> None:
    assert ask(server, "HEAD", "/metrics")[0] == 200
    assert ask(server, "HEAD", "/v1/models/gone")[0] == 404
    status, headers, _ = ask(server, "HEAD", CHAT)
    assert (status, headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models//", "/health/", "//health//ready/"]
)
def test_slashes_too_many(server: Server, path: str) -> None:
    status, _, body = ask(server, "GET", path)
    assert (status, b"tiny" in body or b"ready" in body) == (200, True)


def test_slashes_of_posts(server: Server) -> None:
    for path, good in GOOD.items():
        assert post(server, f"/{path}/", good)[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate, gzip", "GZIP"])
def test_compressed_bodies(server: Server, encoding: str) -> None:
    body = gzip.compress(json.dumps(GOOD[TEXT]).encode())
    status, headers, answer = post(server, TEXT, body, **{"content-encoding": encoding})
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert encoding.lower() in answer["error"]["message"]


def test_a_body_that_says_it_is_not_compressed(server: Server) -> None:
    assert post(server, TEXT, GOOD[TEXT], **{"content-encoding": "identity"})[0] == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_proxies_may_not_hold_streams_back(server: Server, path: str) -> None:
    body = json.dumps({**GOOD[path], "stream": True}).encode()
    status, headers, _ = ask(server, "POST", path, body, content_type="application/json")
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        (b"{", None, "JSON"),
        ({"himap": {"shallow_ratio": 2}}, "himap.shallow_ratio", "1"),
        ({"himap": {"deep_ratio": 0.95}}, "himap.deep_ratio", "0.9"),
        ({"messages": [{"role": 5}]}, "messages[0]", ""),
        ({"seed": 2**63}, "seed", "9223372036854775807"),
        ({"seed": -(2**63) - 1}, "seed", "-9223372036854775808"),
        ({"himap": {"shallow_ratio": 2**70}}, "himap.shallow_ratio", "less than 1"),
        ({"vllm_xargs": {"himap_deep_ratio": 2**70}}, "himap_deep_ratio", "[0, 0.9]"),
        ({"vllm_xargs": {"himap_deep_ratio": [-(2**70)]}}, "himap_deep_ratio", "[0, 0.9]"),
        ({"stop_token_ids": [1, 2**64]}, "stop_token_ids[1]", "9223372036854775807"),
        ({"temperature": -1}, "temperature", ""),
    ],
)
def test_errors_name_the_field_as_clients_write_it(
    server: Server, body: Any, param: str | None, word: str
) -> None:
    whole = body if isinstance(body, bytes) else {**GOOD[CHAT], **body}
    status, _, answer = post(server, CHAT, whole)
    error = answer["error"]
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", None)
    found = error["param"] if param is None else error["param"][: len(param)]
    assert found == param
    assert word in error["message"]


def test_whatever_is_out_of_range_is_named(server: Server) -> None:
    wrong = []
    for path, fields, param in OUT_OF_RANGE:
        status, _, answer = post(server, path, {**GOOD[path], **fields})
        error = answer.get("error", {})
        if (status, error.get("param")) != (400, param):
            wrong.append((path, fields, status, error))
    assert not wrong


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0])
def test_the_smallest_and_the_largest_seed(server: Server, seed: int) -> None:
    assert post(server, CHAT, {**GOOD[CHAT], "seed": seed, "temperature": 1})[0] == 200


@pytest.mark.parametrize("maximum", [2**63, 2**64 - 1, 10**40, -(2**63) - 1])
def test_schemas_may_have_large_integers(server: Server, maximum: int) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maximum": maximum}}}
    fields = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, _, answer = post(server, CHAT, {**GOOD[CHAT], "response_format": fields})
    assert (status, answer.get("error")) == (200, None)


@pytest.mark.parametrize("path", ["resp_x", "resp_x/cancel", "resp_x/input_items"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_stored_responses_have_no_routes(server: Server, path: str, method: str) -> None:
    request = urllib.request.Request(f"{server.url}{RESPONSES}/{path}", method=method)
    if method == "POST":
        request.add_header("content-type", "application/json")
        request.data = b"{}"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 404
    assert json.load(refused.value)["error"]["type"] == "not_found_error"


def test_background_is_refused_by_its_own_reason(server: Server) -> None:
    status, _, answer = post(server, RESPONSES, {**GOOD[RESPONSES], "background": True})
    assert (status, answer["error"]["param"]) == (400, "background")
    assert "VLLM" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("tokens", "end"), [(2, "response.incomplete"), (None, "response.completed")]
)
def test_a_truncated_responses_stream_ends_as_incomplete(
    server: Server, tokens: int | None, end: str
) -> None:
    extra = {} if tokens else {"structured_outputs": {"choice": ["a"]}}
    events = list(
        client(server).responses.create(
            model="tiny", input="Once", max_output_tokens=tokens, stream=True, extra_body=extra
        )
    )
    last: Any = events[-1]
    assert (last.type, last.response.status) == (end, end.removeprefix("response."))
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_usage_has_what_pruning_saved_where_it_applies(server: Server) -> None:
    unpruned = {"himap_shallow_ratio": 0, "himap_deep_ratio": 0}
    for fields, present in (
        ({}, True),  # the server prunes
        ({"himap": {"enabled": False}}, True),  # asked for
        ({"vllm_xargs": unpruned}, True),
        ({"messages": [{"role": "user", "content": "Once"}]}, False),  # nothing to prune
        ({"messages": [{"role": "user", "content": "Once"}], "himap": {}}, False),
    ):
        _, _, answer = post(server, CHAT, {**GOOD[CHAT], **fields})
        assert ("himap" in answer["usage"]) == present


def test_load_balancers_are_told_the_load(server: Server) -> None:
    for path in GOOD:
        for stream in (False, True):
            body = json.dumps({**GOOD[path], "stream": stream}).encode()
            for form, start in (("TEXT", "TEXT named_metrics."), ("json", "JSON {")):
                status, headers, _ = ask(
                    server, "POST", path, body,
                    content_type="application/json", endpoint_load_metrics_format=form,
                )  # fmt: skip
                report = headers["endpoint-load-metrics"]
                assert (status, report[: len(start)]) == (200, start)
                assert "kv_cache_usage_perc" in report
                assert "num_requests_waiting" in report
    _, headers, _ = ask(
        server, "POST", TEXT, json.dumps(GOOD[TEXT]).encode(),
        content_type="application/json", endpoint_load_metrics_format="xml",
    )  # fmt: skip
    assert "endpoint-load-metrics" not in headers
    assert json.loads(ask(server, "GET", "/load")[2]) == {"server_load": 0}


def test_behind_a_path_prefix(server: Server) -> None:
    assert post(server, f"/proxy{TEXT}", GOOD[TEXT])[0] == 200
    document = json.loads(ask(server, "GET", "/proxy/openapi.json")[2])
    assert document["servers"] == [{"url": "/proxy"}]
    assert b"/proxy/openapi.json" in ask(server, "GET", "/proxy/docs")[2]


@pytest.mark.parametrize(("origin", "status"), [(ORIGIN, 200), ("https://other.example", 400)])
def test_browsers_may_ask_from_the_operators_origins(
    server: Server, origin: str, status: int
) -> None:
    found, headers, _ = ask(
        server, "OPTIONS", CHAT,
        origin=origin, access_control_request_method="POST",
        access_control_request_headers="authorization,content-type",
    )  # fmt: skip
    allowed = origin if status == 200 else None
    assert (found, headers["access-control-allow-origin"]) == (status, allowed)
    _, headers, _ = ask(server, "GET", "/v1/models", origin=origin)
    assert headers["access-control-allow-origin"] == allowed
    assert "x-request-id" in headers["access-control-expose-headers"]


def http_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer, however its bytes come."""
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        return answer.status, answer.read()


def test_idle_connections_stay_and_slow_headers_do_not(server: Server) -> None:
    """After 6 s: uvicorn's own limit for idle connections is 5."""
    address = urlsplit(server.url)
    request = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    with (
        socket.create_connection((address.hostname, address.port), 30) as idle,
        socket.create_connection((address.hostname, address.port), 30) as slow,
    ):
        idle.sendall(request)
        assert http_answer(idle)[0] == 200
        slow.sendall(request[:-2])
        time.sleep(6)
        idle.sendall(request)
        assert http_answer(idle)[0] == 200
        status, body = http_answer(slow)
        assert status == 408
        assert json.loads(body)["error"]["message"]
