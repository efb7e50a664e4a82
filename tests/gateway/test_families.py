# SPDX-License-Identifier: Apache-2.0
"""Families other than LLaVA-1.5 behind the gateway: M-RoPE with any resolution, images in tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Case, World
from tests.families import TINY
from tests.gateway.support import client, gateway, post
from tests.servers import Server, picture_message
from tests.test_families import PICTURES


@pytest.fixture(scope="module", params=["qwen2.5-vl", "idefics3"])
def served(world: World, request: pytest.FixtureRequest) -> Iterator[tuple[str, Server]]:
    name: str = request.param
    with gateway(world.checkpoint(name)) as server:
        server.wait_for("/health/ready")
        yield name, server


def test_images_in_earlier_turns(world: World, served: tuple[str, Server]) -> None:
    name, server = served
    image = TINY[name].image
    first, second = PICTURES[0], PICTURES[2]  # of different sizes
    prompt = f"USER: {image}\nWhat? ASSISTANT: Red.</s>USER: {image}\nAnd this? ASSISTANT:"
    expected = world.oracle(name, Case(prompt, (first, second), (0.5, 0.75), max_tokens=8))
    answer = client(server).chat.completions.create(
        model="tiny",
        messages=[
            picture_message(first, "What?"),
            {"role": "assistant", "content": "Red."},
            picture_message(second, "And this?"),
        ],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={
            "himap": {"shallow_ratio": 0.5, "deep_ratio": 0.75},
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    (choice,) = answer.choices
    assert choice.model_dump()["token_ids"] == expected.tokens
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    assert logprobs == pytest.approx(expected.logprobs, abs=2e-3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    himap = answer.usage.model_dump()["himap"]
    assert himap["kept_shallow"] == sum(map(len, expected.kept_shallow))
    assert himap["kept_deep"] == sum(map(len, expected.kept_deep))


def test_typed_placeholders_are_refused(served: tuple[str, Server]) -> None:
    name, server = served
    typed = [TINY[name].image, *({"qwen2.5-vl": ["<|image_pad|>", "<|video_pad|>"]}.get(name, []))]
    for text in typed:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"Hello {text}"}]}
        status, _, answer = post(server, "/v1/chat/completions", body)
        assert status == 400
        assert "image" in answer["error"]["message"]
    assert server.status("/health/ready") == 200
