# SPDX-License-Identifier: Apache-2.0
"""The gateway through LangChain, LiteLLM, the OpenAI SDK for Node, and Java's HttpClient."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.gateway.clients import (
    DATA_URL,
    GREEDY,
    HIMAP,
    KEPT_DEEP,
    NUM_TOKENS,
    ROOM,
    Expected,
    Paint,
    chat_messages,
    responses_input,
    savings,
    tool,
)
from tests.servers import Server

NODE_PACKAGE = "openai@7.55.0"  # exact: a new release must not turn CI red by itself


@pytest.fixture
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client libraries must not look elsewhere for prices, or tell anyone of the tests."""
    resolve = socket.getaddrinfo

    def resolve_loopback(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1", "localhost"), f"wants to reach {host!r}"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_loopback)


# LangChain


@pytest.mark.usefixtures("only_loopback")
def test_langchain(
    server: Server, url: str, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    def model(**options: Any) -> ChatOpenAI:
        settings: dict[str, Any] = {
            "model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0,
            "max_tokens": NUM_TOKENS, "max_retries": 0, "extra_body": {"himap": HIMAP}, **options,
        }  # fmt: skip
        return ChatOpenAI(**settings)

    message = HumanMessage(chat_messages(url)[0]["content"])
    answer = model().invoke([message])
    assert answer.content == expected.text
    assert savings(answer.response_metadata["token_usage"]["himap"]) == expected.usage["himap"]

    # LangChain keeps of a stream's usage what it knows.
    chunks = list(model(stream_usage=True).stream([message]))
    assert "".join(str(chunk.content) for chunk in chunks) == expected.text
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usages[0]["input_tokens"] == expected.usage["prompt_tokens"]

    answer = model(use_responses_api=True).invoke([message])
    assert answer.text == expected.responses_text

    structured = model(max_tokens=ROOM).with_structured_output(Paint, method="json_schema")
    assert isinstance(structured.invoke([message]), Paint)
    calling = model(max_tokens=ROOM).bind_tools(
        [Paint], tool_choice="any", strict=True, parallel_tool_calls=False
    )
    (call,) = calling.invoke([message]).tool_calls
    assert call["name"] == "Paint"
    assert Paint.model_validate(call["args"])


# LiteLLM


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own use of pydantic
@pytest.mark.usefixtures("only_loopback")
def test_litellm(
    server: Server, url: str, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else fetched when imported
    monkeypatch.setenv("LITELLM_MODE", "PRODUCTION")  # else it reads .env files
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    request: dict[str, Any] = {
        "model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none",
        "messages": chat_messages(url), "max_tokens": NUM_TOKENS, "temperature": 0,
        "max_retries": 0, "extra_body": {"himap": HIMAP},
    }  # fmt: skip
    answer: Any = litellm.completion(**request)
    assert answer.choices[0].message.content == expected.text
    assert savings(answer.usage.himap) == expected.usage["himap"]

    # LiteLLM keeps of a stream's usage what it knows.
    chunks: list[Any] = list(
        litellm.completion(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].usage.prompt_tokens == expected.usage["prompt_tokens"]

    with pytest.raises(litellm.exceptions.BadRequestError, match="deep_ratio"):
        litellm.completion(**{**request, "extra_body": {"himap": {"deep_ratio": 0.95}}})


# Node


@pytest.fixture(scope="module")
def node_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the Node SDK and our script."""
    directory = tmp_path_factory.mktemp("node")
    # Without a lock file in the repository: it would hold the addresses of a registry.
    subprocess.run(
        [str(programs.find("npm")), "install", "--no-audit", "--no-fund", "--no-package-lock",
         "--ignore-scripts", "--prefix", str(directory), NODE_PACKAGE],
        check=True, timeout=120,
    )  # fmt: skip
    # Beside its modules: that is where Node looks for what a module imports.
    shutil.copy(Path(__file__).with_name("node_client.mjs"), directory)
    return directory


def test_node(server: Server, url: str, expected: Expected, node_directory: Path) -> None:
    given = {
        "baseURL": f"{server.url}/v1",
        "himap": HIMAP,
        "chat": {**GREEDY, "messages": chat_messages(url)},
        "tools": [tool()],
        "room": ROOM,
        "response": {
            "model": "tiny", "input": responses_input(url), "max_output_tokens": NUM_TOKENS,
            "temperature": 0,
        },
    }  # fmt: skip
    ran = subprocess.run(
        [str(programs.find("node")), "node_client.mjs"],
        input=json.dumps(given), cwd=node_directory, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout)
    assert got["models"] == ["tiny"]
    assert got["chat"]["choices"][0]["message"]["content"] == expected.text
    assert savings(got["chat"]["usage"]["himap"]) == expected.usage["himap"]
    assert got["streamed"] == expected.text
    assert savings(got["streamUsage"]["himap"]) == expected.usage["himap"]
    assert got["tool"]["name"] == "paint"
    assert Paint.model_validate_json(got["tool"]["arguments"])
    assert Paint.model_validate(got["parsed"])
    assert got["response"]["output_text"] == expected.responses_text
    assert got["response"]["usage"]["himap"]["kept_deep"] == KEPT_DEEP
    assert got["responseStreamed"] == expected.responses_text
    assert len(got["text"]) == NUM_TOKENS
    assert got["error"]["name"] == "BadRequestError"
    assert got["error"]["status"] == 400
    assert "deep_ratio" in got["error"]["message"]


# Java


def test_java(server: Server, expected: Expected) -> None:
    body = {**GREEDY, "messages": chat_messages(DATA_URL), "himap": HIMAP}
    bodies = (body, {**body, "stream": True}, {**body, "himap": {"deep_ratio": 0.95}})
    ran = subprocess.run(
        ["java", str(Path(__file__).with_name("JavaClient.java")),
         f"{server.url}/v1/chat/completions", *map(json.dumps, bodies)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answers: dict[str, list[tuple[str, str]]] = {}
    for line in ran.stdout.splitlines():
        name, status, text = line.split(" ", 2)
        answers.setdefault(name, []).append((status, text))
    for name in ("first", "second", "chunked", "expecting", "together"):
        for status, text in answers[name]:
            assert (name, status) == (name, "200")
            assert json.loads(text)["choices"][0]["message"]["content"] == expected.text
    assert len(answers["together"]) == 4
    *events, (_, end) = answers["stream"]
    assert end == "data: [DONE]"
    deltas = [json.loads(text.removeprefix("data: "))["choices"][0]["delta"] for _, text in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == expected.text
    ((status, text),) = answers["refused"]
    assert (status, "deep_ratio" in text) == ("400", True)
