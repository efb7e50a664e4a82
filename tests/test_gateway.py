# SPDX-License-Identifier: Apache-2.0
"""`himap serve` end to end: OpenAI client, `usage.himap`, errors, probes, drain, engine death."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.checkpoints import sample_images
from tests.conftest import DEEP_LAYER, IMAGE_TOKENS, SHALLOW_LAYER, Case, World
from tests.servers import Server, picture_message, running

PICTURES = tuple(sample_images(4, seed=3))
QUESTION = "What is this?"
MESSAGES = [picture_message(PICTURES[0], QUESTION)]


@contextmanager
def gateway(checkpoint: Path, *flags: str) -> Iterator[Server]:
    """Run `himap serve`."""
    command = [
        str(Path(sys.executable).with_name("himap")), "serve", str(checkpoint),
        "--served-model-name", "tiny", "--enforce-eager",
        "--shallow-layer", str(SHALLOW_LAYER), "--deep-layer", str(DEEP_LAYER),
        "--max-deep-ratio", "0.9",
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
        "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20), *flags,
    ]  # fmt: skip
    with running(command, {}) as server:
        yield server


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    with gateway(world.checkpoint("mha12")) as server:
        # Live long before the model is loaded; not ready, and requests are refused with a reason.
        server.wait_for("/health/live", 60)
        assert server.status("/health/ready") == 503
        status, headers, body = post(server, "/v1/chat/completions", {})
        assert status == 503
        assert headers["Retry-After"]
        assert body["error"]["message"] == "the model is loading"
        server.wait_for("/health/ready")
        yield server


def post(server: Server, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and JSON body of a raw POST."""
    request = urllib.request.Request(
        f"{server.url}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_equals_the_oracle_and_says_what_was_saved(world: World, server: Server) -> None:
    case = Case(f"USER: <image>\n{QUESTION} ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=8)
    expected = world.oracle("mha12", case)
    answer = client(server).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={
            "himap": {"shallow_ratio": 0.5, "deep_ratio": 0.75},
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    choice: Any = answer.choices[0]
    assert choice.token_ids == expected.tokens
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)
    usage: Any = answer.usage
    num_tokens = len(expected.prompt_token_ids)
    assert usage.prompt_tokens == num_tokens
    assert usage.himap["image_tokens"] == IMAGE_TOKENS
    assert usage.himap["kept_shallow"] == len(expected.kept_shallow[0])
    assert usage.himap["kept_deep"] == len(expected.kept_deep[0])
    assert usage.himap["kv_tokens_unpruned"] == 12 * num_tokens
    assert usage.himap["kv_tokens"] == 2 * num_tokens + 6 * (num_tokens - 18) + 4 * (
        num_tokens - 31
    )
    assert 0.5 < usage.himap["prefill_flops_ratio"] < 0.8


@pytest.mark.parametrize(
    ("himap", "kept_deep"),
    [
        (None, 5),  # the server's default, (0.5, 0.75)
        ({}, 5),
        ({"deep_ratio": 0}, 18),
        ({"enabled": False}, 36),
        ({"enabled": False, "deep_ratio": 0.5}, 36),
        ({"shallow_ratio": 0, "deep_ratio": 0}, 36),
    ],
)
def test_streaming_usage(server: Server, himap: Any, kept_deep: int) -> None:
    chunks = client(server).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={} if himap is None else {"himap": himap},
    )
    usage: Any = [chunk.usage for chunk in chunks if chunk.usage is not None][-1]
    assert usage.himap["kept_deep"] == kept_deep
    assert (usage.himap["prefill_flops_ratio"] == 1) == (kept_deep == 36)


def test_text_only_answers_have_no_savings(server: Server) -> None:
    answer = client(server).completions.create(model="tiny", prompt=["One", "Two"], max_tokens=2)
    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert not hasattr(answer.usage, "himap")


@pytest.mark.parametrize(
    ("himap", "names"),
    [
        ({"shallow_ratio": 1}, ("shallow_ratio", "less than 1")),
        ({"shallow_ratio": -0.1}, ("shallow_ratio", "greater than or equal to 0")),
        ({"shallow_ratio": "0.5"}, ("shallow_ratio", "valid number")),
        ({"deep_ratio": True}, ("deep_ratio", "valid number")),
        ({"deep_ratio": 0.95}, ("himap_deep_ratio", "[0, 0.9]")),
        ({"ratio": 0.5}, ("ratio", "not permitted")),
        ({"enabled": "yes"}, ("enabled", "valid boolean")),
        ("on", ("himap", "dictionary")),
    ],
)
def test_bad_options_name_the_field_and_the_range(
    server: Server, himap: Any, names: tuple[str, str]
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client(server).chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=2, extra_body={"himap": himap}
        )
    body: Any = error.value.body
    assert all(name in body["message"] for name in names)
    assert body["type"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/picture.png",
        "https://example.com/picture.png",
        "file:///etc/hostname",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:video/jpeg;base64,AAAA",
        "DATA:text/html,hello",
    ],
)
def test_only_pictures_in_data_urls(server: Server, url: str) -> None:
    message: Any
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"image_url": url},
        # vLLM goes by the keys as soon as there is a uuid.
        {"type": "text", "text": "hi", "uuid": "u", "image_url": url},
        {"type": "text", "text": "hi", "uuid": "u", "video_url": url},
        {"type": "audio_url", "audio_url": {"url": url}},
    ]
    for part, extra in [*((part, {}) for part in parts), (parts[0], {"task": 1})]:
        # A field of a wrong type makes validation leave the content as an iterator.
        message = {"role": "user", "content": [part], **extra}
        with pytest.raises(openai.BadRequestError, match="data URL"):
            client(server).chat.completions.create(model="tiny", messages=[message])


def test_request_ids(server: Server) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    _, headers, first = post(server, "/v1/chat/completions", body, **{"X-Request-Id": "abc-1"})
    assert headers["X-Request-Id"] == "abc-1"
    _, headers, second = post(server, "/v1/chat/completions", body, **{"X-Request-Id": "abc-1"})
    assert first["id"] != second["id"]
    _, headers, _ = post(server, "/v1/chat/completions", body)
    assert len(headers["X-Request-Id"]) == 32
    _, headers, _ = post(server, "/v1/chat/completions", body, **{"X-Request-Id": "x" * 200})
    assert len(headers["X-Request-Id"]) == 32


def test_only_the_listed_routes_exist(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as response:
        document = json.load(response)
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/version",
        "/health/live", "/health/ready", "/metrics",
    }  # fmt: skip
    assert "HiMAPOptions" in document["components"]["schemas"]
    for path in ("/tokenize", "/v1/embeddings", "/pause", "/collective_rpc", "/invocations"):
        status, headers, body = post(server, path, {})
        assert (status, body["error"]["code"]) == (404, 404)
        assert headers["X-Request-Id"]
    assert server.status("/version") == 200
    assert [model.id for model in client(server).models.list().data] == ["tiny"]


def test_metrics(server: Server) -> None:
    def value(name: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value('himap_requests_total{outcome="pruned"}')
    seen = value('himap_image_tokens_total{stage="0"}')
    client(server).chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert value('himap_requests_total{outcome="pruned"}') == before + 1
    assert value('himap_image_tokens_total{stage="0"}') == seen + IMAGE_TOKENS
    assert value("himap_kv_saved_bytes_total") > 0
    assert value("vllm:prompt_tokens_total") > 0


@pytest.mark.parametrize("flag", [("--api-key", "secret"), ("--ssl-certfile", "x")])
def test_flags_that_would_be_ignored_are_refused(world: World, flag: tuple[str, str]) -> None:
    with gateway(world.checkpoint("mha12"), *flag) as server:
        assert server.process.wait(60) == 2


def test_sigterm_while_loading(world: World) -> None:
    with gateway(world.checkpoint("mha12")) as server:
        server.wait_for("/health/live", 60)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert not psutil.wait_procs(children, timeout=20)[1]


def test_sigterm_lets_requests_in_flight_finish(world: World) -> None:
    with gateway(world.checkpoint("mha12")) as server:
        server.wait_for("/health/ready")
        answers: list[Any] = []

        def ask() -> None:
            answers.append(
                client(server).chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=300, extra_body={"ignore_eos": True}
                )
            )

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.status("/health/live") == 200
        assert server.status("/health/ready") == 503
        status, _, body = post(server, "/v1/chat/completions", {})
        assert (status, body["error"]["message"]) == (503, "the server is shutting down")
        asking.join(60)
        assert answers[0].usage.completion_tokens == 300
        assert server.process.wait(60) == 0


def test_death_of_the_engine_ends_the_service(world: World) -> None:
    with gateway(world.checkpoint("mha12")) as server:
        server.wait_for("/health/ready")
        (core,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "EngineCore" in " ".join(child.cmdline())
        )
        core.kill()
        assert server.process.wait(60) == 1
