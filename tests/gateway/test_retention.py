# SPDX-License-Identifier: Apache-2.0
"""The bundled model keeps what is published: pruned as recommended, through `himap eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from himap_demo import MODEL_PATH

from tests.gateway.support import HIMAP
from tests.gateway.test_eval_commands import himap
from tests.servers import running

PUBLISHED = Path(__file__).parents[2] / "bench" / "results" / "quality-bundled-model.json"
LARGEST_DROP = 0.03
# The first of the published scenes: fewer, hence another retention, but always the same one.
FIRST_SCENE, NUM_SCENES = 20_000, 150


def test_retention_at_the_recommended_setting(tmp_path: Path) -> None:
    published = json.loads(PUBLISHED.read_text())
    _, pruned = published["settings"]
    assert published["data"].endswith(f"from number {FIRST_SCENE} on")
    recommended = json.loads((MODEL_PATH / "himap.json").read_text())
    ratios = (recommended["shallow_ratio"], recommended["deep_ratio"])
    assert ratios == (pruned["ratios"]["shallow"], pruned["ratios"]["deep"])
    with running([HIMAP, "serve", "--enforce-eager"], {}, tmp_path / "server.log") as server:
        server.wait_for("/health/ready")
        himap(
            "eval", "--url", f"{server.url}/v1", "--ratios", "{},{}".format(*ratios),
            "--first-scene", str(FIRST_SCENE), "--num-scenes", str(NUM_SCENES),
            "--min-retention", str(pruned["retention"]["value"] - LARGEST_DROP),
            "--no-plot", "--quiet", "--output", str(tmp_path),
        )  # fmt: skip
    # Nor by dropping less.
    found = json.loads((tmp_path / "results.json").read_text())["settings"][1]
    left = pruned["savings"]["image_token_layers"]
    assert found["savings"]["image_token_layers"] == pytest.approx(left)
