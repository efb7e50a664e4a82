# SPDX-License-Identifier: Apache-2.0
"""`"himap": {"trace": true}`: which image tokens each cut kept, and where they lie."""

from __future__ import annotations

import base64
import io
import itertools
import json
import urllib.request
from typing import Any

import pytest
from PIL import Image

from tests.engines import Case
from tests.gateway.images import PICTURES
from tests.gateway.support import client, post
from tests.servers import Server, picture_message
from tests.world import World

CHAT = "/v1/chat/completions"
RATIOS = {"shallow_ratio": 0.5, "deep_ratio": 0.75}


def body(*pictures: Image.Image, **more: Any) -> dict[str, Any]:
    content = [picture_message(picture, "and ")["content"] for picture in pictures]
    messages = [{"role": "user", "content": list(itertools.chain(*content))}]
    return {"model": "tiny", "max_tokens": 2, "temperature": 0, "messages": messages, **more}


def kept(grid: dict[str, Any], name: str) -> list[int]:
    """Indices of the cells that are left, from run lengths."""
    cells: list[bool] = []
    for index, length in enumerate(grid[name]):
        cells += [index % 2 == 1] * length
    assert len(cells) == grid["rows"] * grid["columns"]
    return [index for index, is_kept in enumerate(cells) if is_kept]


def relative(positions: list[list[int]], all_positions: list[list[int]]) -> list[list[int]]:
    pairs = zip(positions, all_positions, strict=True)
    return [[image.index(position) for position in own] for own, image in pairs]


def traces(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [image["trace"] for image in answer["usage"]["himap"]["images"]]


def test_what_was_kept_equals_the_oracle(world: World, server: Server) -> None:
    pictures = PICTURES[0], PICTURES[1].resize((90, 45))
    prompt = "USER: <image>\nand <image>\nand  ASSISTANT:"
    expected = world.oracle("mha12", Case(prompt, pictures, (0.5, 0.75), 2))
    images = [
        [place for place, token in enumerate(expected.prompt_token_ids) if token == 3][at : at + 36]
        for at in (0, 36)
    ]
    asked = body(*pictures, himap={**RATIOS, "trace": True})
    status, _, answer = post(server, CHAT, asked)
    assert status == 200
    found = traces(answer)
    assert [(trace["width"], trace["height"]) for trace in found] == [(64, 64), (90, 45)]
    for trace, size in zip(found, ((64, 64), (90, 45)), strict=True):
        (grid,) = trace["grids"]
        assert (grid["kind"], grid["rows"], grid["columns"]) == ("whole", 6, 6)
        cell = {"cell_width": round(size[0] / 6, 3), "cell_height": round(size[1] / 6, 3)}
        assert grid["box"] == {"left": 0, "top": 0, **cell}
        assert trace["other_tokens"] == [0, 0, 0]
        assert "scores_shallow" not in grid
    grids = [trace["grids"][0] for trace in found]
    for name, positions in (
        ("kept_shallow", expected.kept_shallow),
        ("kept_deep", expected.kept_deep),
    ):
        assert [kept(grid, name) for grid in grids] == relative(positions, images)

    # The same in a stream, in the Responses API, and with several answers.
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        server.url + CHAT, json.dumps(streamed).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = response.read().decode().split("\n\n")
    last = json.loads(events[-3].removeprefix("data: "))
    assert traces(last) == found
    several = client(server).chat.completions.create(
        model="tiny",
        messages=asked["messages"],
        max_tokens=2,
        n=2,
        extra_body={"himap": asked["himap"]},
    )
    usage: Any = several.usage
    assert traces({"usage": {"himap": usage.himap}}) == found
    url = asked["messages"][0]["content"][0]["image_url"]["url"]
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"}]
    response_body = {
        "model": "tiny", "max_output_tokens": 2, "himap": {**RATIOS, "trace": True},
        "input": [{"role": "user", "content": parts}],
    }  # fmt: skip
    status, _, answer = post(server, "/v1/responses", response_body)
    assert status == 200
    assert len(kept(traces(answer)[0]["grids"][0], "kept_deep")) == 5


def test_scores(server: Server) -> None:
    status, _, answer = post(server, CHAT, body(PICTURES[0], himap={**RATIOS, "trace": "scores"}))
    assert status == 200
    (grid,) = traces(answer)[0]["grids"]
    for name, came in (("shallow", range(36)), ("deep", kept(grid, "kept_shallow"))):
        scores, left = grid[f"scores_{name}"], kept(grid, f"kept_{name}")
        assert [index for index, score in enumerate(scores) if score is not None] == list(came)
        lowest = min(scores[index] for index in left)
        assert all(scores[index] <= lowest for index in came if index not in left)


def test_a_turned_photo_is_measured_upright(server: Server) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    PICTURES[2].resize((80, 40)).save(file, "JPEG", exif=exif)
    asked = body(PICTURES[2], himap={"trace": True})
    data = base64.b64encode(file.getvalue()).decode()
    asked["messages"][0]["content"][0]["image_url"]["url"] = f"data:image/jpeg;base64,{data}"
    status, _, answer = post(server, CHAT, asked)
    assert status == 200
    (trace,) = traces(answer)
    assert (trace["width"], trace["height"]) == (40, 80)
    assert trace["grids"][0]["box"]["cell_height"] == round(80 / 6, 3)


@pytest.mark.parametrize(
    "more",
    [
        {"himap": {"enabled": False, "trace": True}},
        {"himap": {"trace": True}, "prompt_logprobs": 1},
    ],
)
def test_an_unpruned_prompt_kept_everything(server: Server, more: dict[str, Any]) -> None:
    status, _, answer = post(server, CHAT, body(PICTURES[0], **more))
    assert status == 200
    (grid,) = traces(answer)[0]["grids"]
    assert grid["kept_shallow"] == grid["kept_deep"] == [0, 36]


def test_no_trace_unless_asked(server: Server) -> None:
    for himap in ({}, {"trace": False}):
        _, _, answer = post(server, CHAT, body(PICTURES[0], himap={**RATIOS, **himap}))
        assert all("trace" not in image for image in answer["usage"]["himap"]["images"])
    text = {"model": "tiny", "prompt": "one two", "max_tokens": 1, "himap": {"trace": True}}
    status, _, answer = post(server, "/v1/completions", text)
    assert (status, "himap" in answer["usage"]) == (200, False)  # no image


@pytest.mark.parametrize(
    ("more", "param", "text"),
    [
        ({"himap": {"trace": "yes"}}, "himap.trace", "True, False or 'scores'"),
        ({"himap": {"trace": 2}}, "himap.trace", "True, False or 'scores'"),
        ({"himap": {"trace": []}}, "himap.trace", "True, False or 'scores'"),
        ({"himap": {"trace": True}, "stream": True}, "stream_options.include_usage", "must be"),
        ({"vllm_xargs": {"himap_trace": "a"}}, "vllm_xargs.himap_trace", "use himap.trace"),
    ],
)
def test_what_is_refused(server: Server, more: dict[str, Any], param: str, text: str) -> None:
    status, _, answer = post(server, CHAT, body(PICTURES[0], **more))
    assert status == 400
    assert answer["error"]["param"] == param
    assert text in answer["error"]["message"]
