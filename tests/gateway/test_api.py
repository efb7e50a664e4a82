# SPDX-License-Identifier: Apache-2.0
"""`himap serve` end to end: OpenAI client, `usage.himap`, errors, probes, drain, engine death."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import openai
import pytest

from tests.engines import IMAGE_TOKENS, Case
from tests.gateway.images import PICTURES
from tests.gateway.support import answer_as_the_oracle, client, metric, post
from tests.servers import Server, picture_message
from tests.world import World

QUESTION = "What is this?"
MESSAGES = [picture_message(PICTURES[0], QUESTION)]


def test_chat_equals_the_oracle_and_says_what_was_saved(world: World, server: Server) -> None:
    case = Case(f"USER: <image>\n{QUESTION} ASSISTANT:", PICTURES[:1], (0.5, 0.75), max_tokens=8)
    expected = world.oracle("mha12", case)
    usage = answer_as_the_oracle(server, MESSAGES, expected)
    num_tokens = len(expected.prompt_token_ids)
    assert usage["image_tokens"] == IMAGE_TOKENS
    assert usage["kv_tokens_unpruned"] == 12 * num_tokens
    assert usage["kv_tokens"] == 2 * num_tokens + 6 * (num_tokens - 18) + 4 * (num_tokens - 31)
    assert 0.5 < usage["prefill_flops_ratio"] < 0.8


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


def test_a_grammar_that_would_take_the_memory(server: Server) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Count."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }
    status, _, answer = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert answer["error"]["param"] == "response_format"
    assert "more than 100000 repetitions" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("himap", "names"),
    [
        ({"shallow_ratio": 1}, ("shallow_ratio", "less than 1")),
        ({"shallow_ratio": -0.1}, ("shallow_ratio", "greater than or equal to 0")),
        ({"shallow_ratio": "0.5"}, ("shallow_ratio", "a number")),
        ({"deep_ratio": True}, ("deep_ratio", "a number")),
        ({"deep_ratio": 0.95}, ("himap.deep_ratio", "[0, 0.9]")),
        ({"votes": "last"}, ("himap.votes", "'turn' or 'all'")),
        ({"votes": ["all"]}, ("himap.votes", "'turn' or 'all'")),
        ({"ratio": 0.5}, ("ratio", "not permitted")),
        ({"enabled": "yes"}, ("enabled", "a boolean")),
        ("on", ("himap", "an object")),
    ],
)
def test_bad_options_name_the_field_and_the_range(
    server: Server, himap: Any, names: tuple[str, str]
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client(server).chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=2,
                stream=stream,
                extra_body={"himap": himap},
            )
        body: Any = error.value.body
        assert all(name in body["message"] for name in names)
        assert body["type"]
        assert names[0] in body["param"]


def test_hostile_structures_are_refused_at_once(server: Server) -> None:
    """None may take more than its share of the event loop, or of the memory."""
    item = {"type": "message", "role": "x", "content": [{"type": "zzz"}]}
    message = {"role": "user", "content": "x"}
    bodies: list[tuple[str, dict[str, Any], str | None]] = [
        ("/v1/responses", {"input": [item] * 2000}, "input[0]"),
        ("/v1/responses", {"input": [item] * 5000}, "input"),
        (
            "/v1/chat/completions",
            {"messages": [message] * 5000},
            "messages",
        ),
        ("/v1/chat/completions", {"messages": [{"role": 1}] * 4000}, "messages[0]"),
        ("/v1/chat/completions", {"messages": MESSAGES, "x" * 100_000: [""] * 10_000}, None),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "x" * 300}, "model"),
    ]
    for path, body, param in bodies:
        begun = time.monotonic()
        status, _, answer = post(server, path, {"model": "tiny", "max_tokens": 1, **body})
        assert time.monotonic() - begun < 5
        if param is None:
            assert status == 200
        else:
            assert status == 400
            assert param.partition("[")[0] in answer["error"]["param"]
            assert len(answer["error"]["message"]) <= 400


def test_a_second_turn_as_sdks_send_it(server: Server) -> None:
    """What the first turn answered goes back whole, in all forms that clients make of it."""
    asked: Any = {"role": "user", "content": QUESTION}
    image = picture_message(PICTURES[0], QUESTION)["content"][0]["image_url"]["url"]
    pictured: Any = {"role": "user", "content": [{"type": "input_image", "image_url": image}]}
    request: Any = {"model": "tiny", "max_output_tokens": 4, "temperature": 0}
    asking = client(server)
    first = asking.responses.create(input=[asked], **request)
    said = {"type": "output_text", "text": first.output_text}
    turns: list[list[Any]] = [
        list(first.output),
        [item.model_dump() for item in first.output],
        [{"role": "assistant", "content": [said]}],
        [{"role": "assistant", "content": first.output_text}],
    ]
    answers = {
        asking.responses.create(input=[asked, *turn, asked], **request).output_text
        for turn in turns
    }
    assert len(answers) == 1
    nulls = {"background": None, "truncation": None, "service_tier": None, "instructions": None}
    body = {**request, **nulls, "input": [pictured]}
    status, _, plain = post(server, "/v1/responses", body)
    assert (status, plain.get("error")) == (200, None)
    status, _, fitting = post(server, "/v1/responses", {**body, "truncation": "auto"})
    assert (status, fitting["output"][0]["content"]) == (200, plain["output"][0]["content"])
    assert fitting["truncation"] == "auto"
    long = {"role": "user", "content": "x" * 2000}
    body["input"] = [pictured, long]
    status, _, refused = post(server, "/v1/responses", {**body, "truncation": "auto"})
    assert (status, "maximum context length" in refused["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": "call"},
        {"content": [], "tool_calls": "call"},
        {"tool_calls": "call"},
        {"content": None, "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
    ids=ascii,
)
def test_an_assistants_message_of_every_form(server: Server, message: dict[str, Any]) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    if "tool_calls" in message:
        message = {**message, "tool_calls": [call]}
    messages = [*MESSAGES, {"role": "assistant", **message}, MESSAGES[0]]
    body = {"model": "tiny", "messages": messages, "max_tokens": 2}
    status, _, answer = post(server, "/v1/chat/completions", body)
    assert (status, answer.get("error")) == (200, None)
    assert answer["usage"]["himap"]["image_tokens"] == 2 * IMAGE_TOKENS


def test_beam_search_does_not_prune(server: Server) -> None:
    pruned = 'himap_requests_total{outcome="pruned"}'
    before = metric(server, pruned)
    body = {"model": "tiny", "messages": MESSAGES, "use_beam_search": True, "n": 2, "max_tokens": 3}
    status, _, answer = post(server, "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "use_beam_search")
    image, _ = MESSAGES[0]["content"]
    long = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION * 9}]}]
    unpruned = (
        {"himap": {"enabled": False}, "messages": long},
        {"vllm_xargs": {"himap_shallow_ratio": 0, "himap_deep_ratio": 0}},
        {"messages": [{"role": "user", "content": QUESTION}]},
    )
    for fields in unpruned:
        status, _, answer = post(server, "/v1/chat/completions", {**body, **fields})
        assert (status, len(answer["choices"])) == (200, 2)
        if "himap" in answer["usage"]:
            assert answer["usage"]["himap"]["kept_deep"] == IMAGE_TOKENS
            # Each step of each beam finds the prompt again.
            cached = answer["usage"]["himap"]["cached_tokens"]
            assert cached < answer["usage"]["prompt_tokens"]
    assert metric(server, pruned) == before


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
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models",
        "/v1/models/{model_id}", "/version", "/health", "/health/live", "/health/ready", "/load",
        "/metrics",
    }  # fmt: skip
    assert "HiMAPOptions" in document["components"]["schemas"]
    for path in ("/tokenize", "/v1/embeddings", "/pause", "/collective_rpc", "/invocations"):
        status, headers, body = post(server, path, {})
        assert (status, body["error"]["type"]) == (404, "not_found_error")
        assert headers["X-Request-Id"]
    assert [model.id for model in client(server).models.list().data] == ["tiny"]


def test_metrics(server: Server) -> None:
    counters = (
        'himap_requests_total{outcome="pruned"}',
        'himap_image_tokens_total{stage="0"}',
        'himap_image_tokens_by_outcome_total{outcome="pruned"}',
        'himap_time_to_first_token_seconds_count{model_name="tiny",pruned="true"}',
        'himap_time_per_output_token_seconds_count{model_name="tiny",pruned="true"}',
        'himap_e2e_request_latency_seconds_count{model_name="tiny",pruned="true"}',
        'himap_request_queue_time_seconds_count{model_name="tiny",pruned="true"}',
        'himap_gateway_overhead_seconds_count{model_name="tiny",pruned="true"}',
        'himap_images_total{model_name="tiny"}',
    )
    before = {name: metric(server, name) for name in counters}
    asked_once = [picture_message(PICTURES[0], "A question of this test alone?")]
    client(server).chat.completions.create(model="tiny", messages=asked_once, max_tokens=2)
    after = {name: metric(server, name) for name in counters}
    gained = {name: after[name] - before[name] for name in counters}
    assert gained == {name: IMAGE_TOKENS if "image_tokens" in name else 1 for name in counters}
    assert metric(server, "himap_kv_saved_bytes_total") > 0
    assert (
        0
        < metric(server, "himap_prefill_flops_total")
        < metric(server, "himap_prefill_flops_unpruned_total")
    )
    assert metric(server, "vllm:prompt_tokens_total") > 0
    assert metric(server, "himap_requests_in_flight") == 0


def test_a_body_of_too_many_values(server: Server) -> None:
    status, _, answer = post(server, "/v1/completions", {"model": "tiny", "prompt": [1] * 300_002})
    assert (status, "300000 values" in answer["error"]["message"]) == (413, True)
