# SPDX-License-Identifier: Apache-2.0
"""The ratios that the gateway gives each image, within the range of an API key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from himap_server.errors import GatewayError
from himap_server.pruning import PruningPolicy
from himap_server.schemas import ChatRequest
from himap_server.security.keys import Key

from himap_vllm.config import EngineSettings

KEY = Key(name="k", sha256="0" * 64, shallow_ratio=(0.1, 0.4), deep_ratio=(0, 0.5))
MESSAGES = [{"role": "user", "content": "x"}]


def applied(details: Sequence[Any], key: Key | None = None, **fields: Any) -> dict[str, Any]:
    """The arguments that the engine gets."""
    settings = EngineSettings(max_deep_ratio=0.8)
    request: Any = ChatRequest.model_validate({"messages": MESSAGES, **fields})
    PruningPolicy(settings, (0.9, 0.9)).apply(request, key, details)
    args: dict[str, Any] = request.vllm_xargs or {}
    return args


def pairs(args: dict[str, Any]) -> list[tuple[float, float]]:
    return list(zip(args["himap_shallow_ratio"], args["himap_deep_ratio"], strict=True))


def test_details_within_the_servers_bounds() -> None:
    assert applied(()) == applied(("auto", "auto")) == {}
    args = applied(("high", "auto", "low", "original"))
    assert pairs(args) == [(0, 0), (0.5, 0.75), (0.9, 0.8), (0, 0)]
    assert args["himap_if_possible"] is True
    asked = applied(("low", "auto"), himap={"deep_ratio": 0.25})
    assert (pairs(asked), asked["himap_if_possible"]) == ([(0.9, 0.8), (0.5, 0.25)], False)
    off = applied(("low", "high"), himap={"enabled": False})
    assert off == {"himap_shallow_ratio": 0, "himap_deep_ratio": 0}


def test_votes_go_to_the_engine() -> None:
    assert applied((), himap={"votes": "all"}) == {"himap_votes": "all"}
    assert applied((), himap={"votes": "all", "enabled": False}).get("himap_votes") is None


def test_a_key_that_demands_pruning_is_not_softened() -> None:
    """A prompt that can't be pruned is refused then, whatever the client says."""
    soft: dict[str, Any] = {"vllm_xargs": {"himap_if_possible": 1}}
    assert applied((), **soft) == {"himap_if_possible": 1}
    assert applied((), KEY, **soft) == {"himap_shallow_ratio": 0.4, "himap_deep_ratio": 0.5}
    assert applied(("low",), KEY, **soft)["himap_if_possible"] is False
    # A key that only caps ratios demands nothing: what it changed was not asked for.
    capped = Key(name="k", sha256="0" * 64, shallow_ratio=(0, 0.4))
    assert applied(("high", "low"), capped)["himap_if_possible"] is True


def test_details_are_brought_into_the_range_of_a_key() -> None:
    details = ("high", "auto", "low")
    assert pairs(applied(details, KEY)) == [(0.1, 0), (0.4, 0.5), (0.4, 0.5)]
    args = applied(details, KEY, himap={"shallow_ratio": 0.25, "deep_ratio": 0})
    assert pairs(args) == [(0.1, 0), (0.25, 0), (0.4, 0.5)]


@pytest.mark.parametrize("details", [("auto", "auto"), ("low", "high")])
def test_lists_win_over_details_and_keep_to_the_range(details: Sequence[str]) -> None:
    given = {"himap_shallow_ratio": [0.1, 0.4]}
    assert applied(details, vllm_xargs=given) == given
    assert applied(details, KEY, vllm_xargs=given) == {**given, "himap_deep_ratio": 0.5}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"himap": {"shallow_ratio": 0.5}}, "himap.shallow_ratio"),
        ({"himap": {"enabled": False}}, "himap.shallow_ratio"),
        ({"vllm_xargs": {"himap_shallow_ratio": [0.1, 0]}}, "himap.shallow_ratio"),
        ({"vllm_xargs": {"himap_deep_ratio": [0.6, 0]}}, "himap.deep_ratio"),
        ({"vllm_xargs": {"himap_deep_ratio": 0.6}}, "himap.deep_ratio"),
    ],
)
def test_ratios_that_are_named_are_refused_outside(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(GatewayError) as refused:
        applied(("high", "low"), KEY, **fields)
    assert (refused.value.status_code, refused.value.param) == (403, param)


@pytest.mark.parametrize(("detail", "refused"), [("high", False), ("low", True), ("auto", True)])
def test_beam_search_with_details(detail: str, refused: bool) -> None:
    if refused:
        with pytest.raises(GatewayError, match="beam search"):
            applied((detail,), use_beam_search=True)
    else:
        assert pairs(applied((detail,), use_beam_search=True)) == [(0, 0)]
