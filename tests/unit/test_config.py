# SPDX-License-Identifier: Apache-2.0
"""Bad settings become clear errors that name the field and the allowed range."""

from dataclasses import asdict
from typing import Any, get_args

import pytest

from himap_vllm.config import (
    NEEDS_NO_TEXT,
    CriterionName,
    EngineSettings,
    HiMAPError,
    engine_settings,
    requested_ratios,
)
from himap_vllm.criteria import CRITERIA
from himap_vllm.plan.cuts import default_cuts, wasted_share
from himap_vllm.plan.prompt import Ratios


@pytest.mark.parametrize(
    ("raw", "parameter", "message"),
    [
        ({"shallow_ratio": -0.1}, "shallow_ratio", r"in \[0, 1\), got -0.1"),
        ({"shallow_ratio": 1}, "shallow_ratio", r"in \[0, 1\), got 1"),
        ({"deep_ratio": float("nan")}, "deep_ratio", r"in \[0, 1\), got nan"),
        ({"deep_ratio": float("inf")}, "deep_ratio", r"in \[0, 1\), got inf"),
        ({"deep_ratio": "0.5"}, "deep_ratio", "must be a number in .* got str"),
        ({"deep_ratio": True}, "deep_ratio", "must be a number in .* got bool"),
        ({"deep_ratio": None}, "deep_ratio", "must be a number in .* got NoneType"),
        ({"max_deep_ratio": 0.5}, "deep_ratio", r"in \[0, 0.5\], got 0.75"),
        ({"max_deep_ratio": 1.0}, "max_deep_ratio", r"in \[0, 1\), got 1"),
        ({"ratio": 0.5}, "ratio", "unknown himap setting 'ratio'; known: shallow_layer"),
        ({"shallow_layer": 0}, "shallow_layer", "integer >= 1, got 0"),
        ({"shallow_layer": 2.0}, "shallow_layer", "integer >= 1, got 2.0"),
        ({"deep_layer": True}, "deep_layer", "integer >= 2, got True"),
        ({"shallow_layer": 8, "deep_layer": 8}, "deep_layer", r"shallow_layer \(8\), got 8"),
        ({"deep_layer": 1}, "deep_layer", "integer >= 2, got 1"),
        ({"trace_requests": -1}, "trace_requests", "integer >= 0"),
        ({"criterion": "best"}, "criterion", "one of himap, fastv, .*, got 'best'"),
        ({"criterion": []}, "criterion", r"one of himap, .*, got \[\]"),
        ({"criterion": "himap+best"}, "criterion", r"two as A\+B or .*, got 'himap\+best'"),
        ({"criterion": "himap+himap+himap"}, "criterion", r"two as A\+B"),
        ({"criterion": {"shallow": "himap"}}, "criterion", r"two as A\+B"),
        ({"criterion": {"shallow": "himap", "deep": []}}, "criterion", r"two as A\+B"),
        ({"votes": "some"}, "votes", "one of turn, all, got 'some'"),
        ({"votes": ["all"]}, "votes", "one of turn, all, got"),
        ({"turn_marker": ""}, "turn_marker", "a text or a list of token ids, and not empty"),
        ({"turn_marker": []}, "turn_marker", "a text or a list of token ids, and not empty"),
        ({"turn_marker": 5}, "turn_marker", "a text or a list of token ids"),
        ({"turn_marker": [3, "a"]}, "turn_marker", "integer >= 0, got 'a'"),
        ([], "himap", "must be an object, got list"),
    ],
)
def test_bad_engine_settings(raw: Any, parameter: str, message: str) -> None:
    with pytest.raises(HiMAPError, match=message) as error:
        EngineSettings.parse(raw)
    assert error.value.parameter == parameter


def test_second_cut_lies_inside_the_decoder() -> None:
    EngineSettings().check_depth(9)
    with pytest.raises(HiMAPError, match="below the decoder's 8 layers, got 8"):
        EngineSettings().check_depth(8)


def test_first_cut_lies_behind_the_deepstack() -> None:
    EngineSettings(shallow_layer=3).check_depth(36, first_cut=3)
    with pytest.raises(HiMAPError, match="at least 3 for this model, got 2") as error:
        EngineSettings().check_depth(36, first_cut=3)
    assert error.value.parameter == "shallow_layer"


@pytest.mark.parametrize(
    ("raw", "num_layers", "first_cut", "cuts"),
    [
        ({}, 32, 1, (2, 8)),  # the paper's
        ({}, 28, 1, (2, 8)),  # Qwen2.5-VL-7B: at (2, 7), a 15th of the KV cache is padding
        ({}, 28, 3, (4, 8)),  # Qwen3-VL-2B, three levels of deepstack
        ({}, 36, 3, (3, 9)),  # Qwen3-VL-8B, likewise
        ({}, 36, 1, (3, 9)),
        ({}, 24, 1, (2, 6)),
        ({}, 80, 1, (5, 20)),
        ({}, 4, 1, (1, 2)),
        ({"shallow_layer": 9}, 32, 1, (9, 10)),
        ({"deep_layer": 2}, 32, 1, (1, 2)),
        ({"shallow_layer": 4, "deep_layer": 6}, 32, 1, (4, 6)),
    ],
)
def test_cuts_by_depth(
    raw: dict[str, int], num_layers: int, first_cut: int, cuts: tuple[int, int]
) -> None:
    settings = EngineSettings.parse(raw, num_layers, first_cut)
    assert (settings.shallow_layer, settings.deep_layer) == cuts
    settings.check_depth(num_layers, first_cut)


@pytest.mark.parametrize("first_cut", [1, 3])
def test_default_cuts_waste_no_memory(first_cut: int) -> None:
    for num_layers in range(max(first_cut, 2) + 2, 100):
        shallow, deep = default_cuts(num_layers, first_cut)
        assert first_cut <= shallow < deep < num_layers
        assert abs(deep - num_layers / 4) <= max(2.5, first_cut)
        assert wasted_share(shallow, deep, num_layers) < 0.08
        if num_layers in (12, 16, 20, 24, 28, 30, 32, 36, 40, 48, 64, 80):
            assert wasted_share(shallow, deep, num_layers) == 0


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, {"himap": None}])
def test_off_unless_asked_for(additional_config: Any) -> None:
    assert engine_settings(additional_config) is None


@pytest.mark.parametrize(
    ("args", "pairs", "asked"),
    [
        (None, [(0.25, 0.75)] * 3, False),
        ({"other": "x"}, [(0.25, 0.75)] * 3, False),
        ({"himap_deep_ratio": 0.5}, [(0.25, 0.5)] * 3, True),
        ({"himap_deep_ratio": 0.5, "himap_if_possible": 1}, [(0.25, 0.5)] * 3, False),
        ({"himap_shallow_ratio": 0, "himap_deep_ratio": 0}, [(0, 0)] * 3, False),
        ({"himap_shallow_ratio": [0, 0.5, 0.9]}, [(0, 0.75), (0.5, 0.75), (0.9, 0.75)], True),
        (
            {"himap_shallow_ratio": [0, 0, 0.5], "himap_deep_ratio": (0, 0.75, 0)},
            [(0, 0), (0, 0.75), (0.5, 0)],
            True,
        ),
        ({"himap_shallow_ratio": [0, 0, 0], "himap_deep_ratio": 0}, [(0, 0)] * 3, False),
    ],
)
def test_request_overrides_defaults_field_by_field(
    args: Any, pairs: list[tuple[float, float]], asked: bool
) -> None:
    settings = EngineSettings.parse({"shallow_ratio": 0.25})
    found = requested_ratios(settings, args, 3)
    assert found.images == tuple(Ratios(*pair) for pair in pairs)
    assert found.asked == asked
    assert found.prunes == any(map(any, pairs))


def test_ratios_of_a_prompt_without_images() -> None:
    """A number is what images would get; a list has no place there."""
    found = requested_ratios(EngineSettings(), {"himap_deep_ratio": 0.5}, 0)
    assert (found.images, found.prunes, found.asked) == ((), True, True)
    off: dict[str, Any] = {"himap_shallow_ratio": [], "himap_deep_ratio": []}
    assert not requested_ratios(EngineSettings(), off, 0).prunes


@pytest.mark.parametrize(
    ("args", "parameter", "message"),
    [
        ({"himap_shallow_ratio": 1.0}, "himap_shallow_ratio", r"in \[0, 1\), got 1.0"),
        ({"himap_deep_ratio": -1}, "himap_deep_ratio", r"in \[0, 0.8\], got -1"),
        ({"himap_deep_ratio": 0.81}, "himap_deep_ratio", r"in \[0, 0.8\], got 0.81"),
        ({"himap_deep_ratio": float("nan")}, "himap_deep_ratio", "got nan"),
        ({"himap_deep_ratio": "0.5"}, "himap_deep_ratio", "must be a number in .* got str"),
        ({"himap_deep_ratio": {}}, "himap_deep_ratio", "must be a number in .* got dict"),
        (
            {"himap_deep_ratio": [0.5]},
            "himap_deep_ratio",
            "a list of 2, one for each image of the prompt; got a list of 1",
        ),
        ({"himap_deep_ratio": [0.5] * 3}, "himap_deep_ratio", "got a list of 3"),
        ({"himap_deep_ratio": [0.5, 0.9]}, "himap_deep_ratio[1]", r"in \[0, 0.8\], got 0.9"),
        ({"himap_deep_ratio": [0.5, "0.5"]}, "himap_deep_ratio[1]", "must be a number in .* got s"),
        ({"himap_shallow_ratio": [True, 0]}, "himap_shallow_ratio[0]", "must be a number in"),
        ({"himap_shallow_ratio": [0, [0]]}, "himap_shallow_ratio[1]", "must be a number in"),
        ({"himap_if_possible": "yes"}, "himap_if_possible", "must be true or false, got 'yes'"),
        ({"himap_ratio": 0.5}, "himap_ratio", "unknown parameter 'himap_ratio'"),
        ({"himap_bypass": "x"}, "himap_bypass", "unknown parameter 'himap_bypass'"),
    ],
)
def test_bad_requests(args: dict[str, Any], parameter: str, message: str) -> None:
    settings = EngineSettings.parse({"max_deep_ratio": 0.8})
    with pytest.raises(HiMAPError, match=message) as error:
        requested_ratios(settings, args, 2)
    assert error.value.parameter == parameter


@pytest.mark.parametrize(
    ("given", "spelled", "criteria"),
    [
        ("uniform", "uniform", ("uniform", "uniform")),
        ("uniform+himap", "uniform+himap", ("uniform", "himap")),
        ({"shallow": "uniform", "deep": "himap"}, "uniform+himap", ("uniform", "himap")),
        ({"shallow": "random", "deep": "random"}, "random", ("random", "random")),
    ],
)
def test_a_criterion_for_each_cut(given: Any, spelled: str, criteria: tuple[str, str]) -> None:
    settings = EngineSettings.parse({"criterion": given})
    assert (settings.criterion, settings.criteria) == (spelled, criteria)
    assert EngineSettings.parse(asdict(settings)) == settings


def test_settings_name_all_criteria() -> None:
    assert list(get_args(CriterionName)) == list(CRITERIA)


def test_criteria_that_need_no_text_have_no_voters() -> None:
    assert set(NEEDS_NO_TEXT) == {n for n, one in CRITERIA.items() if not one.needs_text}
    assert EngineSettings(criterion="uniform+himap").needs_text
    assert not EngineSettings(criterion="uniform+random").needs_text


def test_turn_marker() -> None:
    assert EngineSettings.parse({"turn_marker": [3, 4]}).turn_marker == (3, 4)
    assert EngineSettings.parse({"turn_marker": "A:"}).turn_marker == "A:"
