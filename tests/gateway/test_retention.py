# SPDX-License-Identifier: Apache-2.0
"""The bundled model as `himap serve` serves it: retention as published, JSON that ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from himap_demo import MODEL_PATH
from pydantic import BaseModel

from tests.gateway.clients import Paint
from tests.gateway.support import HIMAP, client
from tests.gateway.test_eval_commands import himap
from tests.servers import Server, running

PUBLISHED = Path(__file__).parents[2] / "bench" / "results" / "quality-bundled-model.json"
LARGEST_DROP = 0.03
# The first of the published scenes: fewer, hence another retention, but always the same one.
FIRST_SCENE, NUM_SCENES = 20_000, 150

ASKED: dict[str, Any] = {
    "model": "himap-demo",
    "messages": [{"role": "user", "content": "What is the weather like in Paris today?"}],
}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("bundled") / "server.log"
    with running([HIMAP, "serve", "--enforce-eager"], {}, log) as server:
        server.wait_for("/health/ready")
        yield server


def test_retention_at_the_recommended_setting(bundled: Server, tmp_path: Path) -> None:
    published = json.loads(PUBLISHED.read_text())
    _, pruned = published["settings"]
    assert published["data"].endswith(f"from number {FIRST_SCENE} on")
    recommended = json.loads((MODEL_PATH / "himap.json").read_text())
    ratios = (recommended["shallow_ratio"], recommended["deep_ratio"])
    assert ratios == (pruned["ratios"]["shallow"], pruned["ratios"]["deep"])
    himap(
        "eval", "--url", f"{bundled.url}/v1", "--ratios", "{},{}".format(*ratios),
        "--first-scene", str(FIRST_SCENE), "--num-scenes", str(NUM_SCENES),
        "--min-retention", str(pruned["retention"]["value"] - LARGEST_DROP),
        "--no-plot", "--quiet", "--output", str(tmp_path),
    )  # fmt: skip
    # Nor by dropping less.
    found = json.loads((tmp_path / "results.json").read_text())["settings"][1]
    left = pruned["savings"]["image_token_layers"]
    assert found["savings"]["image_token_layers"] == pytest.approx(left)


def test_json_without_a_limit(bundled: Server) -> None:
    """It ends by itself, because the model can put no white space into it."""
    parsed = client(bundled).chat.completions.parse(
        model="himap-demo",
        messages=[{"role": "user", "content": "What color is the star?"}],
        temperature=0,
        response_format=Paint,
    )
    choice = parsed.choices[0]
    assert (choice.finish_reason, type(choice.message.parsed)) == ("stop", Paint)


class Report(BaseModel):
    summary: str
    labels: list[str]
    count: int
    note: str | None


@pytest.mark.parametrize("form", [Report, {"type": "json_object"}], ids=["schema", "object"])
def test_texts_in_json_end(bundled: Server, form: Any) -> None:
    asking: Any = client(bundled).chat.completions
    choice = asking.parse(**ASKED, response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_a_newcomers_tool(bundled: Server, choice: Any, stream: bool) -> None:
    """The example of OpenAI's documentation, without a limit."""
    location = {"type": "string", "description": "City and country"}
    schema = {"type": "object", "properties": {"location": location}, "required": ["location"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    request: dict[str, Any] = {**ASKED, "tools": [tool], "tool_choice": choice}
    asking: Any = client(bundled).chat.completions
    if stream:
        chunks = [chunk.choices[0] for chunk in asking.create(**request, stream=True)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        name = calls[0].function.name
        arguments = "".join(call.function.arguments or "" for call in calls if not call.index)
    else:
        call = asking.create(**request).choices[0].message.tool_calls[0].function
        name, arguments = call.name, call.arguments
    assert name == "get_weather"
    assert list(json.loads(arguments)) == ["location"]


def test_a_tool_that_may_be_called(bundled: Server) -> None:
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    asking: Any = client(bundled).chat.completions
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        (choice,) = asking.create(**ASKED, tools=[tool], max_tokens=20, **more).choices
        # It knows no weather, and may say nothing.
        assert choice.finish_reason in ("stop", "length", "tool_calls")
        assert choice.message.tool_calls or choice.message.content is not None
