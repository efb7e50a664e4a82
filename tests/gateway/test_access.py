# SPDX-License-Identifier: Apache-2.0
"""API keys, their limits and ratio ranges, limits of size and time, and what the log says."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.controls import CONTROLLED, CONTROLS
from tests.gateway.guarded import Guarded, make_key
from tests.gateway.support import HIMAP, client, gateway, metric, post
from tests.gateway.test_api import MESSAGES
from tests.gateway.uuids import check_forms, check_names
from tests.servers import Server
from tests.world import World

SECRET = "a sentence that no log may repeat"
LONG = {"model": "tiny", "prompt": SECRET, "max_tokens": 400, "ignore_eos": True}
PREFIX = "one two three four " * 8


@pytest.fixture(scope="module")
def guarded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("keys")
    limits: dict[str, dict[str, Any]] = {
        "plain": {},
        "123": {},
        "rated": {"requests_per_minute": 2},
        "single": {"max_concurrent": 1},
        "bounded": {"shallow_ratio": [0.1, 0.4], "deep_ratio": [0, 0.5]},
        "later": {},
    }
    keys, entries = {}, {}
    # Starting the command takes a while: one after the other names them all.
    for name, limit in limits.items():
        keys[name], entry = make_key(name)
        entries[name] = {**entry, **limit}
    settings = folder / "serve.yaml"
    settings.write_text(
        "max-images: 2\nrequest_timeout: 600\nmax_prompt_tokens: 300\nseed: 5\n"
        f"api-keys-file: {folder / 'keys.yaml'}\n"
    )
    guarded = Guarded(Server(None, ""), keys, entries, folder / "keys.yaml", folder / "log")  # type: ignore[arg-type]
    guarded.write("plain", "rated", "single", "bounded")
    with gateway(
        world.checkpoint("mha12"),
        *("--config", str(settings), "--max-body-bytes", "200000"),
        *("--root-path", "/proxy/", "--no-playground", "--no-allow-traces"),
        environment={
            "HIMAP_REQUEST_TIMEOUT": "1.5",
            "HIMAP_MAX_BODY_BYTES": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
        },
        log=guarded.log,
    ) as server:
        guarded.server = server
        server.wait_for("/health/ready")
        yield guarded


def test_no_playground_if_the_operator_says_so(guarded: Guarded) -> None:
    for path in ("/playground", "/playground/settings.json", "/proxy/playground/app.js"):
        assert guarded.server.status(path) == 404


@pytest.mark.parametrize("trace", [True, "scores"])
def test_no_trace_if_the_operator_says_so(guarded: Guarded, trace: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "himap": {"trace": trace}}
    status, _, answer = guarded.post(body, path="/v1/chat/completions")
    assert (status, answer["error"]["param"]) == (400, "himap.trace")
    assert "this server gives no traces" in answer["error"]["message"]


def test_without_a_key_there_is_nothing(guarded: Guarded) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {guarded.keys['plain']}"},
        {"Authorization": f"Bearer {guarded.keys['later']}"},
        {"Authorization": "Bearer \u00fc"},
    ):
        for path in ("/v1/chat/completions", "/v1/nothing"):
            status, _, body = post(guarded.server, path, {}, **headers)
            assert (status, body["error"]["type"]) == (401, "authentication_error")
            assert body["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client(guarded.server).models.list()
    assert client(guarded.server, guarded.keys["plain"]).models.list().data
    assert metric(guarded.server, 'himap_refused_requests_total{model_name="tiny",reason="key"}')
    assert guarded.server.status("/health/ready") == 200


@pytest.mark.parametrize("root", ["", "/proxy", "//proxy/"])
def test_behind_a_path_prefix(guarded: Guarded, root: str) -> None:
    """With and without the prefix: some proxies take it off. The keys hold either way."""
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    assert guarded.post(body, path=f"{root}/v1/completions")[0] == 200
    assert guarded.server.status(f"{root}/health/ready") == 200
    assert post(guarded.server, f"{root}/v1/completions", body)[0] == 401
    assert post(guarded.server, f"/proxy{root}/v1/completions", body)[0] in (401, 404)


def test_a_key_is_kept_as_its_hash(guarded: Guarded) -> None:
    assert all(key not in guarded.file.read_text() for key in guarded.keys.values())
    assert all(key not in guarded.log.read_text() for key in guarded.keys.values())


def test_requests_per_minute(guarded: Guarded) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    assert [guarded.post(body, "rated")[0] for _ in range(2)] == [200, 200]
    status, headers, answer = guarded.post(body, "rated")
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert guarded.post(body, "plain")[0] == 200


def test_concurrent_requests(guarded: Guarded) -> None:
    slow = client(guarded.server, guarded.keys["single"]).completions.create(
        model="tiny",
        prompt="hi",
        max_tokens=20,  # this server ends requests after 1.5 s
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(slow))
    status, headers, answer = guarded.post({"model": "tiny", "prompt": "hi"}, "single")
    assert (status, "1 request at a time" in answer["error"]["message"]) == (429, True)
    assert headers["Retry-After"]
    assert len(list(slow)) > 10
    assert guarded.post({"model": "tiny", "prompt": "hi", "max_tokens": 1}, "single")[0] == 200


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        # 36 image tokens. The server's defaults (0.5, 0.75), brought into the key's range.
        ({}, (22, 11)),
        ({"himap": {"shallow_ratio": 0.25}}, (27, 14)),
        ({"himap": {"shallow_ratio": 0.4, "deep_ratio": 0}}, (22, 22)),
        ({"himap": {"shallow_ratio": 0.5}}, "himap.shallow_ratio"),
        ({"himap": {"deep_ratio": 0.6}}, "himap.deep_ratio"),
        ({"himap": {"enabled": False}}, "himap.shallow_ratio"),
        ({"vllm_xargs": {"himap_deep_ratio": 0.6}}, "himap.deep_ratio"),
        ({"vllm_xargs": {"himap_shallow_ratio": [0.1]}}, (33, 17)),
        ({"vllm_xargs": {"himap_shallow_ratio": [0]}}, "himap.shallow_ratio"),
        ({"detail": "high"}, (33, 33)),
        ({"detail": "low"}, (22, 11)),
        ({"detail": "high", "himap": {"shallow_ratio": 0.5}}, "himap.shallow_ratio"),
    ],
)
def test_ratios_of_a_key(guarded: Guarded, extra: dict[str, Any], kept: Any) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1, **extra}
    image = {**MESSAGES[0]["content"][0]["image_url"], "detail": body.pop("detail", None)}
    body["messages"] = [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]
    status, _, answer = guarded.post(body, "bounded", "/v1/chat/completions")
    if isinstance(kept, tuple):
        usage = answer["usage"]["himap"]
        assert (usage["kept_shallow"], usage["kept_deep"]) == kept
    else:
        assert (status, answer["error"]["param"]) == (403, kept)
        assert "[0" in answer["error"]["message"]


def test_a_key_file_rewritten_while_serving(guarded: Guarded) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    assert guarded.post(body, "later")[0] == 401
    guarded.write("plain", "later")
    assert guarded.post(body, "later")[0] == 200
    assert guarded.post(body, "single")[0] == 401
    # A file that can't be used changes nothing, and says so where an operator looks.
    errors = metric(guarded.server, "himap_api_key_file_errors_total")
    for content in ("keys: [", "keys: []", "keys:\n  - name: x\n    sha256: short\n"):
        guarded.file.write_text(content)
        assert guarded.post(body, "later")[0] == 200
    guarded.file.unlink()
    assert guarded.post(body, "later")[0] == 200
    assert metric(guarded.server, "himap_api_key_file_errors_total") == errors + 4
    assert "API keys stay as they were" in guarded.log.read_text()
    guarded.write("plain", "rated", "single", "bounded")
    assert guarded.post(body, "later")[0] == 401


def test_keys_do_not_share_a_prefix_cache(guarded: Guarded) -> None:
    body = {"model": "tiny", "prompt": PREFIX, "max_tokens": 1}

    def hits(key: str) -> float:
        before = metric(guarded.server, "vllm:prefix_cache_hits_total")
        status, _, answer = guarded.post(body, key)
        assert status == 200, answer
        return metric(guarded.server, "vllm:prefix_cache_hits_total") - before

    assert hits("plain") == 0
    assert hits("plain") > 0
    assert hits("single") == 0


def test_images_by_uuid(guarded: Guarded) -> None:
    check_names(guarded)
    check_forms(guarded)


def test_a_body_too_large(guarded: Guarded) -> None:
    # By flag: it goes before environment and file.
    status, _, answer = guarded.post({"model": "tiny", "prompt": "x" * 300_000})
    assert (status, "200000 bytes" in answer["error"]["message"]) == (413, True)
    with socket_to(guarded.server) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {guarded.keys['plain']}\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        for _ in range(40):
            connection.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(1000)


def test_a_body_that_is_no_json(guarded: Guarded) -> None:
    authorization = {"Authorization": f"Bearer {guarded.keys['plain']}"}
    status, _, answer = post(
        guarded.server, "/v1/completions", {}, **{"content-type": "text/plain", **authorization}
    )
    assert (status, answer["error"]["type"]) == (415, "invalid_request_error")
    status, _, answer = guarded.post(b"{")
    assert status == 400


def test_prompts_and_images_have_limits_of_the_file(guarded: Guarded) -> None:
    status, _, answer = guarded.post({"model": "tiny", "prompt": [7] * 301})
    assert (status, "at most 300" in answer["error"]["message"]) == (400, True)
    status, _, answer = guarded.post(
        {"model": "tiny", "messages": MESSAGES * 3}, path="/v1/chat/completions"
    )
    assert (status, "at most 2" in answer["error"]["message"]) == (400, True)


def test_a_request_that_takes_too_long(guarded: Guarded) -> None:
    # By environment: it goes before the file.
    body = {**LONG, "n": 8, "temperature": 1}
    begun = time.monotonic()
    status, _, answer = guarded.post(body)
    assert (status, "1.5 s" in answer["error"]["message"]) == (408, True), answer
    assert time.monotonic() - begun < 10
    guarded.wait_until_idle()


def test_a_stream_that_takes_too_long(guarded: Guarded) -> None:
    ask = client(guarded.server, guarded.keys["plain"]).completions.create
    extra = {"ignore_eos": True}
    with pytest.raises(openai.APIError, match=r"longer than 1\.5 s"):
        # A busy machine may not even begin in time: then it is the status, and no event.
        list(ask(model="tiny", prompt="hi", max_tokens=400, n=8, stream=True, extra_body=extra))
    guarded.wait_until_idle()


def test_a_body_that_never_ends(guarded: Guarded) -> None:
    with socket_to(guarded.server) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {guarded.keys['plain']}\r\ncontent-length: 100\r\n\r\n"
        )
        connection.sendall(head.encode() + b"{")
        assert b" 408 " in connection.recv(1000)


def test_a_client_that_vanishes_in_mid_stream(guarded: Guarded) -> None:
    body = json.dumps({**LONG, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {guarded.keys['plain']}\r\nx-request-id: vanishing\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket_to(guarded.server) as connection:
        connection.sendall(head.encode() + body)
        assert b" 200 " in connection.recv(1000)
    line = guarded.line("vanishing")
    assert (line["status"], line["reason"]) == (499, "client_went_away")
    assert 0 < line["completion_tokens"] < 400
    guarded.wait_until_idle()


def test_a_client_that_vanishes_before_its_answer(guarded: Guarded) -> None:
    connection = http.client.HTTPConnection(guarded.server.url.removeprefix("http://"))
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {guarded.keys['plain']}",
        "x-request-id": "vanished",
    }
    connection.request("POST", "/v1/completions", json.dumps(LONG), headers)
    time.sleep(0.5)
    connection.close()
    assert guarded.line("vanished")["status"] == 499
    guarded.wait_until_idle()


def test_the_log_tells_everything_but_what_was_said(guarded: Guarded) -> None:
    text = {"type": "text", "text": SECRET}
    image = MESSAGES[0]["content"][0]
    _, headers, answer = guarded.post(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [image, text]}],
            "max_tokens": 3,
            "ignore_eos": True,
        },
        path="/v1/chat/completions",
    )
    line = guarded.line(headers["X-Request-Id"])
    assert line["key"] == "plain"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["himap"] | {"cached_tokens": line["cached_tokens"]} == answer["usage"]["himap"]
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (line["completion_tokens"], line["images"]) == (3, 1)
    assert 0 < line["overhead_s"] < line["time_to_first_token_s"] < line["duration_s"]
    assert line["time_per_output_token_s"] > 0
    assert line["queue_s"] >= 0
    log = guarded.log.read_text()
    assert SECRET not in log
    assert image["image_url"]["url"][30:90] not in log
    assert all(json.loads(line) for line in log.splitlines() if "vllm.himap" in line)
    assert "loading " in log


def test_vllms_warnings_do_not_repeat_prompts(guarded: Guarded) -> None:
    part = {"type": "text", "text": None, "note": SECRET}
    guarded.post(
        {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1},
        path="/v1/chat/completions",
    )
    assert SECRET not in guarded.log.read_text()


@pytest.mark.parametrize("field", CONTROLLED)
def test_control_characters_are_text(guarded: Guarded, field: str) -> None:
    """And no line of the log can be made by a client: JSON escapes them."""
    path, body, status = CONTROLLED[field]
    answer = guarded.post({"model": "tiny", "max_tokens": 1, **body}, path=path)
    assert answer[0] == status, answer
    log = guarded.log.read_bytes()
    assert CONTROLS[:8].encode() not in log
    assert b'\n{"forged"' not in log


@pytest.mark.parametrize("byte", [b"\0", b"\1", b"\x1b", b"\x7f"])
def test_control_characters_in_headers_are_no_http(guarded: Guarded, byte: bytes) -> None:
    with socket_to(guarded.server) as connection:
        connection.sendall(
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: a" + byte + b"\r\n\r\n"
        )
        assert b" 400 " in connection.recv(1000)


def test_failures_at_start_name_the_setting(world: World, tmp_path: Path) -> None:
    """Of the gateway's own settings, at once: vLLM is not imported."""
    broken = tmp_path / "keys.yaml"
    broken.write_text("keys:\n  - name: a b\n    sha256: x\n")
    high = tmp_path / "high.yaml"
    high.write_text(f"keys:\n  - {{name: a, sha256: {'a' * 64}, deep_ratio: [0.6, 0.9]}}\n")
    for flags, text in (
        (("--max-images", "-1"), "max-images: Input should be greater than or equal to 0"),
        (("--api-keys-file", str(broken)), "keys.0.name"),
        (("--api-keys-file", str(tmp_path / "none")), "No such file"),
        (
            ("--api-keys-file", str(high), "--max-deep-ratio", "0.5", "--deep-ratio", "0.5"),
            "keys.0.deep_ratio: the lowest ratio must be at most --max-deep-ratio 0.5, got 0.6",
        ),
        (("--config", str(tmp_path / "none.yaml")), "No such file"),
        (("--image-hosts", "a,b/c"), "must be host or host:port, got 'b/c'"),
        (("--deep_ratio=1.5",), "deep_ratio must be in"),
    ):
        command = [HIMAP, "serve", str(world.checkpoint("mha12")), *flags]
        profiled = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=profiled, check=False
        )
        assert (done.returncode, text in done.stderr) == (2, True), done.stderr[-500:]
        assert not re.search(r"\| +(torch|vllm)$", done.stderr, re.MULTILINE)


def socket_to(server: Server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)
