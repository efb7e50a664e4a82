# SPDX-License-Identifier: Apache-2.0
"""Families other than LLaVA-1.5 behind the gateway: M-RoPE with any resolution, images in tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoConfig

from tests.engine.test_families import PICTURES
from tests.engines import Case
from tests.families import TINY
from tests.gateway.support import answer_as_the_oracle, gateway, post
from tests.gateway.test_trace import kept
from tests.servers import Server, picture_message
from tests.world import World


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
    messages = [
        picture_message(first, "What?"),
        {"role": "assistant", "content": "Red."},
        picture_message(second, "And this?"),
    ]
    answer_as_the_oracle(server, messages, expected)


def test_traces(world: World, served: tuple[str, Server]) -> None:
    """Each grid has a place, and what was kept equals the oracle's."""
    name, server = served
    picture = PICTURES[2]
    prompt = f"USER: {TINY[name].image}\nWhat? ASSISTANT:"
    expected = world.oracle(name, Case(prompt, (picture,), (0.5, 0.75), max_tokens=1))
    token = AutoConfig.from_pretrained(world.checkpoint(name)).image_token_id
    places = [i for i, own in enumerate(expected.prompt_token_ids) if own == token]
    body = {
        "model": "tiny", "max_tokens": 1, "messages": [picture_message(picture, "What?")],
        "himap": {"shallow_ratio": 0.5, "deep_ratio": 0.75, "trace": True},
    }  # fmt: skip
    status, _, answer = post(server, "/v1/chat/completions", body)
    assert status == 200
    trace = answer["usage"]["himap"]["images"][0]["trace"]
    assert (trace["width"], trace["height"]) == picture.size
    assert len(trace["grids"]) == {"qwen2.5-vl": 1, "idefics3": 3}[name]
    found: list[int] = []
    before = 0
    for grid in trace["grids"]:
        assert grid["box"]["cell_width"] > 0
        found += [before + cell for cell in kept(grid, "kept_deep")]
        before += grid["rows"] * grid["columns"]
    assert [places[cell] for cell in found] == expected.kept_deep[0]


def test_typed_placeholders_are_refused(served: tuple[str, Server]) -> None:
    name, server = served
    typed = [TINY[name].image, *({"qwen2.5-vl": ["<|image_pad|>", "<|video_pad|>"]}.get(name, []))]
    for text in typed:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"Hello {text}"}]}
        status, _, answer = post(server, "/v1/chat/completions", body)
        assert status == 400
        assert "image" in answer["error"]["message"]
    assert server.status("/health/ready") == 200
