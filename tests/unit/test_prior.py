# SPDX-License-Identifier: Apache-2.0
"""Files of a positional prior, and what is read between its places."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from himap_eval.calibrate import mean_of

from himap_vllm.plan.prior import PositionPrior, PriorError, describe_model

MODEL = describe_model(SimpleNamespace(model_type="llama", num_hidden_layers=4, hidden_size=8))


def prior(**layers: list[float]) -> PositionPrior:
    values = {int(name[1:]): np.array(own, dtype=np.float32) for name, own in layers.items()}
    return PositionPrior(MODEL, values)


def test_a_file_says_what_was_written(tmp_path: Path) -> None:
    written = prior(l1=[0.5, 1.5], l3=[1.0, 0.25, 1.75])
    written.write(tmp_path / "prior.json")
    found = PositionPrior.read(tmp_path / "prior.json")
    assert found.model == MODEL
    assert {layer: own.tolist() for layer, own in found.layers.items()} == {
        1: [0.5, 1.5],
        3: [1.0, 0.25, 1.75],
    }
    found.check(MODEL, (1, 3))


def test_other_sizes_lie_between_the_places() -> None:
    known = prior(l1=[1.0, 3.0], l2=[0.0, 2.0])
    assert known.at(1, 2).tolist() == [1.0, 3.0]
    assert known.at(1, 4).tolist() == [1.0, 1.5, 2.5, 3.0]
    assert known.at(1, 1).tolist() == [2.0]
    assert known.at(2, 2)[0] > 0  # it is divided by


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not version 1"),
        ({"format": "other"}, "not version 1"),
        ({"layers": {"1": []}}, "without values"),
        ({"layers": {"1": [-1.0]}}, "below 0"),
        ({"layers": {"1": ["a"]}}, "can't be read"),
        ({"layers": {"one": [1.0]}}, "can't be read"),
        ({"layers": []}, "can't be read"),
        ({"model": None}, "can't be read"),
    ],
)
def test_unusable_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "prior.json"
    prior(l1=[1.0]).write(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PriorError, match=message):
        PositionPrior.read(file)


def test_priors_of_something_else() -> None:
    with pytest.raises(PriorError, match="another model"):
        prior(l1=[1.0]).check({**MODEL, "hidden_size": 16}, (1,))
    with pytest.raises(PriorError, match=r"it has layers \[1\], the cuts follow \[5\]"):
        prior(l1=[1.0]).check(MODEL, (1, 5))


def test_means_are_of_the_size_that_most_images_have() -> None:
    small, large = np.array([1.0, 1.0]), np.array([0.0, 0.0, 2.0, 2.0])
    assert mean_of([small, large, large]).tolist() == pytest.approx([1 / 3, 1 / 3, 5 / 3, 5 / 3])
