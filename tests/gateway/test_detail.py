# SPDX-License-Identifier: Apache-2.0
"""Ratios for each image: OpenAI's `detail`, and lists in `vllm_xargs`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines import IMAGE_TOKENS, Case
from tests.gateway.images import PICTURES
from tests.gateway.support import answer_as_the_oracle, client, metric, post
from tests.gateway.test_images_api import DATA_URL, encoded
from tests.servers import Server
from tests.world import World


def detailed(index: int, detail: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{encoded(PICTURES[index], 'PNG')}"
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def by_image(usage: Any) -> list[tuple[int, int]]:
    assert {image["image_tokens"] for image in usage["images"]} == {IMAGE_TOKENS}
    for key in ("image_tokens", "kept_shallow", "kept_deep"):
        assert usage[key] == sum(image[key] for image in usage["images"])
    return [(image["kept_shallow"], image["kept_deep"]) for image in usage["images"]]


def test_details_in_one_request_equal_the_oracle(world: World, server: Server) -> None:
    """The same picture twice, looked at more and less carefully; text between."""
    text = {"type": "text", "text": "and "}
    content = [detailed(0, "low"), text, detailed(1, "auto"), detailed(0, "high"), text]
    prompt = "USER: <image>\nand <image>\n<image>\nand  ASSISTANT:"
    case = Case(prompt, tuple(PICTURES[i] for i in (0, 1, 0)), ((0.75, 0.5, 0), (0.75, 0.75, 0)), 8)
    messages = [{"role": "user", "content": content}]
    usage = answer_as_the_oracle(server, messages, world.oracle("mha12", case))
    assert by_image(usage) == [(9, 3), (18, 5), (36, 36)]
    assert [image["detail"] for image in usage["images"]] == ["low", "auto", "high"]


WHOLE, AUTO, LOW = (36, 36), (18, 5), (9, 3)


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        ({}, [WHOLE, AUTO, LOW, AUTO]),
        ({"himap": {}}, [WHOLE, AUTO, LOW, AUTO]),
        ({"himap": {"enabled": False}}, [WHOLE] * 4),
        ({"himap": {"enabled": False, "deep_ratio": 0.5}}, [WHOLE] * 4),
        ({"himap": {"shallow_ratio": 0.25}}, [WHOLE, (27, 7), LOW, (27, 7)]),
        ({"himap": {"shallow_ratio": 0, "deep_ratio": 0}}, [WHOLE, WHOLE, LOW, WHOLE]),
        ({"vllm_xargs": {"himap_deep_ratio": 0}}, [WHOLE, (18, 18), LOW, (18, 18)]),
        (
            {"vllm_xargs": {"himap_shallow_ratio": [0.5, 0, 0, 0.25], "himap_deep_ratio": 0}},
            [(18, 18), WHOLE, WHOLE, (27, 27)],
        ),
        # Each by itself would be refused with ratios, and is not with `detail` alone.
        ({"prompt_logprobs": 1}, [WHOLE] * 4),
    ],
)
def test_details_beside_ratios(server: Server, extra: Any, kept: list[tuple[int, int]]) -> None:
    content = [detailed(i, detail) for i, detail in enumerate(("high", "auto", "low", None))]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    status, _, answer = post(server, "/v1/chat/completions", {**body, **extra})
    assert (status, answer.get("error")) == (200, None)
    assert by_image(answer["usage"]["himap"]) == kept


def test_details_of_the_responses_api(server: Server) -> None:
    """`original` is as `high`; older clients send an object, which may have the detail, too."""
    url = DATA_URL
    images: list[Any] = [
        {"image_url": url, "detail": "original"},
        {"image_url": url, "detail": "low"},
        {"image_url": url, "detail": "high"},
        {"image_url": url, "detail": None},
        {"image_url": url},
        {"image_url": {"url": url, "detail": "low"}},
    ]
    tool: Any = [
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_image", "image_url": url, "detail": "high"}],
        },
    ]
    content = [{"type": "input_image", **image} for image in images]
    body: Any = {"model": "tiny", "max_output_tokens": 2, "temperature": 0}
    body["input"] = [{"role": "user", "content": content}, *tool]
    kept = [WHOLE, LOW, WHOLE, AUTO, AUTO, LOW, WHOLE]
    counted = {
        detail: metric(server, f'himap_detail_images_total{{detail="{detail}"')
        for detail in ("auto", "low", "high", "original")
    }
    left = metric(
        server, 'himap_detail_image_tokens_total{detail="low",model_name="tiny",stage="2"'
    )
    status, _, answer = post(server, "/v1/responses", body)
    assert (status, answer.get("error")) == (200, None)
    assert by_image(answer["usage"]["himap"]) == kept
    for detail, more in {"auto": 2, "low": 2, "high": 2, "original": 1}.items():
        name = f'himap_detail_images_total{{detail="{detail}"'
        assert metric(server, name) == counted[detail] + more
    name = 'himap_detail_image_tokens_total{detail="low",model_name="tiny",stage="2"'
    assert metric(server, name) == left + 6
    with client(server).responses.create(stream=True, **body) as stream:
        (final,) = [event for event in stream if event.type == "response.incomplete"]
    assert by_image(final.response.usage.himap) == kept


@pytest.mark.parametrize("detail", ["medium", "", "HIGH", 1, True, ["low"], {}])
def test_unknown_details(server: Server, detail: Any) -> None:
    chat = {"messages": [{"role": "user", "content": [detailed(0, "low"), detailed(0, detail)]}]}
    part = {"type": "input_image", "image_url": DATA_URL, "detail": detail}
    responses = {"input": [{"role": "user", "content": [part]}]}
    for path, body, param in (
        ("/v1/chat/completions", chat, "messages[0].content[1].image_url.detail"),
        ("/v1/responses", responses, "input[0].content[0].detail"),
    ):
        status, _, answer = post(server, path, {"model": "tiny", **body})
        assert (status, answer["error"]["param"]) == (400, param)
        assert answer["error"]["message"] == f"{param} must be auto, low, high or original"


def test_lists_of_ratios_that_do_not_fit(server: Server) -> None:
    content = [detailed(0, "auto"), detailed(1, "auto")]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    for ratios, param, words in (
        ([0.5], "himap_deep_ratio", "a list of 2, one for each image of the prompt; got a list of"),
        ([0.5, 0.95], "himap_deep_ratio[1]", "[0, 0.9]"),
        ([0.5, "x"], "himap_deep_ratio[1]", "must be a number in [0, 0.9]"),
    ):
        xargs = {"himap_deep_ratio": ratios}
        status, _, answer = post(server, "/v1/chat/completions", {**body, "vllm_xargs": xargs})
        assert (status, answer["error"]["param"]) == (400, param)
        assert words in answer["error"]["message"]


def test_beam_search_and_details(server: Server) -> None:
    body = {"model": "tiny", "use_beam_search": True, "n": 2, "max_tokens": 2}
    for detail, status in (("high", 200), ("low", 400), ("auto", 400)):
        messages = [{"role": "user", "content": [detailed(0, detail)]}]
        found, _, answer = post(server, "/v1/chat/completions", {**body, "messages": messages})
        assert found == status
        if status == 200:
            assert by_image(answer["usage"]["himap"]) == [WHOLE]
