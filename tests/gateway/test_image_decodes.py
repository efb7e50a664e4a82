# SPDX-License-Identifier: Apache-2.0
"""An image is decoded once on its way from the request into the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.images import PICTURES, ImageHost
from tests.gateway.support import client, gateway
from tests.servers import Server, picture_message
from tests.world import World


@pytest.fixture(scope="module")
def decodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decodes") / "decodes"


@pytest.fixture(scope="module")
def counting(world: World, image_host: ImageHost, decodes: Path) -> Iterator[Server]:
    with gateway(
        world.checkpoint("mha12"),
        *("--image-hosts", image_host.address),
        environment={"HIMAP_TEST_DECODES": str(decodes)},
        himap=(sys.executable, "-m", "tests.gateway.counting_server"),
    ) as server:
        server.wait_for("/health/ready")
        yield server


@pytest.mark.parametrize(
    ("fetched", "expected"), [(False, ["base64 decoded", "pixels"]), (True, ["pixels"])]
)
def test_an_image_is_decoded_once(
    counting: Server, image_host: ImageHost, decodes: Path, fetched: bool, expected: list[str]
) -> None:
    message = picture_message(PICTURES[0], "What is this?")
    if fetched:
        message["content"][0]["image_url"]["url"] = image_host.url("0.png")
    messages: Any = [message]
    decodes.write_text("")
    client(counting).chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert decodes.read_text().splitlines() == expected
