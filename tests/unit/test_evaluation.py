# SPDX-License-Identifier: Apache-2.0
"""Statistics, scores and reports of `himap eval` and `himap sweep`: no model."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from himap_eval.client import UNPRUNED, Answer
from himap_eval.field_table import published
from himap_eval.items import DataError, Item, conversations, in_conversations, sample
from himap_eval.pareto import (
    Cell,
    EngineChoice,
    pareto_front,
    ratios_for,
    recommended,
    reduction,
)
from himap_eval.results import Result, answered, scores_of, summarize
from himap_eval.scoring import METRICS
from himap_eval.stats import retention
from himap_eval.sweep_report import Findings, write_grid, write_report

from himap_vllm.plan.prompt import Ratios


def test_retention_by_hand() -> None:
    """Two groups: drawn are AA, AB or BA, BB, with ratios 1/2, 3/4 and 1."""
    found = retention([1, 0, 1, 1], [1, 1, 1, 1], ["A", "A", "B", "B"])
    assert (found.value, found.low, found.high) == (0.75, 0.5, 1.0)


def test_pairs_stay_together() -> None:
    """Questions that are wrong either way add no uncertainty."""
    scores = [1, 0] * 50
    found = retention(scores, scores, [str(i) for i in range(100)])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_groups_are_drawn_whole() -> None:
    """Ten copies of every question, in its group, tell nothing new."""
    pruned, unpruned = [1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 0]
    groups = list("ABCDEFGH")
    once = retention(pruned, unpruned, groups)
    copied = retention(pruned * 10, unpruned * 10, groups * 10)
    assert once.low < 1 < once.high
    assert copied == once
    alone = retention(pruned * 10, unpruned * 10, [str(i) for i in range(80)])
    assert alone.high - alone.low < (once.high - once.low) / 2


def test_an_interval_as_wide_as_theory_has_it() -> None:
    """900 of 1000 unpruned answers stay right: a binomial share."""
    found = retention([1] * 900 + [0] * 100, [1] * 1000, [str(i) for i in range(1000)])
    half = 1.96 * math.sqrt(0.9 * 0.1 / 1000)
    assert found.value == 0.9
    assert found.low == pytest.approx(0.9 - half, abs=0.002)
    assert found.high == pytest.approx(0.9 + half, abs=0.002)


def test_nothing_right_unpruned() -> None:
    assert math.isnan(retention([0, 1], [0, 0], ["A", "B"]).value)


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "score"),
    [
        ("exact", " Two  red CIRCLES. ", ["two red circles"], 1),
        ("exact", "two", ["three", "2"], 0),
        ("yes_no", "Yes, there is no doubt.", ["yes"], 1),
        ("yes_no", "There is nothing.", ["no"], 0),
        ("yes_no", "No", ["Yes"], 0),
        ("choice", "B", ["B"], 1),
        ("choice", "(B) the second", ["B"], 1),
        ("choice", "The answer is B.", ["B"], 1),
        ("choice", "Because of it", ["B"], 0),
        ("vqa", "The Dakota.", ["dakota"] * 4 + ["digital"] * 6, 1),
        ("vqa", "Dakota", ["dakota"] * 2 + ["digital"] * 8, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        ("vqa", "two", ["2"] * 10, 1),
        ("vqa", "3.5", ["3.5"] * 10, 1),
        ("vqa", "", ["dakota"] * 10, 0),
        ("anls", "0.28", ["0.28", ".28"], 1),
        ("anls", "  Ja\nMES ", ["ja mes"], 1),
        ("anls", "kitten", ["sitting"], 1 - 3 / 7),
        ("anls", "kitten", ["mitten", "sitting"], 1 - 1 / 6),
        ("anls", "abcd", ["ab"], 0.5),
        ("anls", "abcde", ["ab"], 0),
        ("anls", "", ["", "x"], 1),
        ("contains", "It says\nCentre.", ["CENTRE"], 1),
        ("contains", "It says cent re", ["CENTRE"], 0),
        ("contains_formula", "$ x ^ {2} $", ["x ^ { 2 }"], 1),
        ("contains_formula", "X^{2}", ["x ^ { 2 }"], 0),
        ("iou", '[{"bbox_2d": [10, 20, 30, 50], "label": "5"}]', ["10.0, 20.0, 30.0, 50.0"], 1),
        ("iou", "<box>(10,20),(30,50)</box>", ["10, 20, 30, 50"], 1),
        ("iou", "[0.1, 0.2, 0.3, 0.6]", ["0.1, 0.2, 0.3, 0.4"], 1),
        ("iou", "[0.1, 0.2, 0.3, 0.61]", ["0.1, 0.2, 0.3, 0.4"], 0),
        ("iou", "[5, 5, 1, 1]", ["1, 1, 5, 5"], 0),
        ("iou", "nowhere", ["1, 1, 5, 5"], 0),
        ("iou", "[[10, 20], [30, 40]]", ["10, 20, 30, 40"], 1),
        ("iou", "[.1, .2, .3, .4]", ["0.1, 0.2, 0.3, 0.4"], 1),
        ("iou", "[10. 20. 30. 40.]", ["10, 20, 30, 40"], 1),
        ("iou", "2 (10, 20, 30, 40)", ["10, 20, 30, 40"], 1),
        ("iou", "Image 1 of [2]: (10,20), (30,40)", ["10, 20, 30, 40"], 1),
        ("iou", "1. [10, 20, 30, 40, 0.9]", ["10, 20, 30, 40"], 1),
        ("iou", "1. x1: 10, 20, 30, 40", ["10, 20, 30, 40"], 1),
        ("iou", "[[10, 20, 30, 40], [1, 1, 5, 5]]", ["10, 20, 30, 40"], 1),
    ],
)
def test_scores(metric: str, answer: str, accepted: list[str], score: float) -> None:
    assert METRICS[metric](answer, accepted) == pytest.approx(score)


def test_a_sample_has_whole_groups() -> None:
    items = [Item("data:", str(i), ("x",), "all", str(i // 4)) for i in range(40)]
    chosen = sample(items, 12)
    assert len(chosen) == 12
    assert len({item.group for item in chosen}) == 3
    assert sample(items, 12) == chosen
    assert sample(items, None) == sample(items, 40) == items


def test_conversations_about_an_image() -> None:
    items = [Item("data:", str(i), ("x",), "all", "ABA"[i % 3]) for i in range(9)]
    asked = in_conversations(items, 2)
    # A has six questions; B has three, of which one is left over.
    assert [item.question for item in asked] == ["0", "2", "3", "5", "6", "8", "1", "4"]
    assert [item.turn for item in asked] == [0, 1] * 4
    assert {item.kind for item in asked} == {"question 1", "question 2"}
    assert conversations(asked) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert conversations(items) == [[i] for i in range(9)]
    assert [item.turn for item in sample(asked, 7)].count(1) == 3
    with pytest.raises(DataError, match="no image has 7 questions"):
        in_conversations(items, 7)
    with pytest.raises(DataError, match="conversations of its own"):
        in_conversations(asked, 2)
    with pytest.raises(DataError, match="count together"):
        in_conversations([replace(item, together=item.group) for item in items], 2)


def test_questions_that_count_together() -> None:
    items = [Item("data:", "?", ("A",), "all", "g", "choice", together=own) for own in "112"]
    items.append(Item("data:", "?", ("A",), "all", "g", "choice"))
    answers = [Answer(text) for text in ("A", "B", "A", "B")]
    assert scores_of(items, answers) == [0, 0, 1, 0]
    # The others of a set do not decide alone.
    answers[1] = Answer("", error="timed out")
    assert answered(items, {UNPRUNED: answers}) == [2, 3]
    answers[3] = answers[1]
    assert answered(items, {UNPRUNED: answers}) == [2]


def test_a_sample_has_all_that_count_together() -> None:
    items = [
        Item("data:", str(i), ("x",), "all", str(i % 10), together=str(i % 10)) for i in range(40)
    ]
    chosen = sample(items, 11)
    assert sorted(Counter(item.together for item in chosen).values()) == [4, 4]
    assert len(sample(items, 12)) == 12
    with pytest.raises(DataError, match="--limit 3 is less than"):
        sample(items, 3)


def test_published_rows_are_at_known_budgets() -> None:
    """Of LLaVA-1.5's 576 image tokens: rows of other models do not say which shares they are at."""
    assert {row["model"] for row in published()} == {"llava-1.5-7b"}


def usage(left: float) -> dict[str, Any]:
    """Of a prompt of 20 tokens, 10 of them an image's, in 10 layers."""
    return {"image_tokens": 10, "kept_shallow": 5, "kept_deep": 2, "kv_tokens_unpruned": 200,
            "kv_tokens": 100 + round(100 * left), "prefill_flops_ratio": left}  # fmt: skip


def result(scores: list[int], left: float, ratios: Ratios = UNPRUNED) -> Result:
    """Of answers that are right where `scores` says so, against all right."""
    items = [Item("data:", "?", ("yes",), "all", str(i)) for i in range(len(scores))]
    answers = [Answer("yes" if right else "no", 1, 2, 20, usage(left)) for right in scores]
    return summarize(items, ratios, answers, [Answer("yes")] * len(scores))


def test_savings_from_usage() -> None:
    found = result([1, 1, 0, 1], 0.31)
    assert found.savings is not None
    assert found.accuracy == found.agreement == 0.75
    assert found.savings.image_token_layers == pytest.approx(0.31)
    assert found.savings.kv_tokens == pytest.approx(131 / 200)
    assert found.savings.kept == "5, 2 of 10"
    assert (found.ttft, found.latency) == (1, 2)


def cell(
    criterion: str, layers: tuple[int, int], scores: list[int], left: float, target: float = 0.5
) -> Cell:
    engine = EngineChoice(criterion, *layers)
    numbers = [float(score) for score in scores]
    return Cell(engine, result(scores, left, Ratios(0.5, 0.75)), numbers, target)


def test_kinds_and_tags() -> None:
    """A question counts for its kind, and for its tag across kinds."""
    kinds = (("color", "small"), ("color", ""), ("shape", "small"), ("shape", "large"))
    items = [Item("data:", "?", ("yes",), kind, "a", tag=tag) for kind, tag in kinds]
    said = [Answer(text) for text in ("yes", "no", "no", "yes")]
    found = summarize(items, UNPRUNED, said, [Answer("yes")] * 4).kinds
    assert {name: (own.num_items, own.accuracy) for name, own in found.items()} == {
        "color": (2, 0.5), "shape": (2, 0.5), "large": (1, 1.0), "small": (2, 0.5),
    }  # fmt: skip


def test_pareto_front_and_recommendation() -> None:
    cheap = cell("himap", (1, 2), [1] * 60 + [0] * 40, 0.2)
    beaten = cell("himap", (1, 4), [1] * 50 + [0] * 50, 0.3)
    good = cell("himap", (2, 4), [1] * 98 + [0] * 2, 0.4)
    costly = cell("himap", (4, 8), [1] * 99 + [0], 0.7)
    cells = [costly, beaten, good, cheap]
    assert pareto_front(cells) == [cheap, good, costly]
    assert recommended(cells, 0.98) is good
    assert recommended(cells, 0.985) is costly
    assert recommended(cells, 1.0) is None


def test_ratios_that_reach_a_reduction() -> None:
    assert reduction(0.5, (2, 8), 32) == pytest.approx((6 * 0.5 + 24 * 0.875) / 32)
    assert ratios_for(reduction(0.5, (2, 8), 32), (2, 8), 32) == Ratios(0.5, 0.75)
    for target in (0.5, 0.67, 0.78, 0.89):
        found = ratios_for(target, (1, 4), 16)
        assert found is not None
        assert reduction(found.shallow, (1, 4), 16) == pytest.approx(target, abs=1e-3)
        assert found.deep == pytest.approx(1 - (1 - found.shallow) ** 2, abs=1e-3)
    assert ratios_for(0.67, (6, 8), 16) is None


@pytest.mark.parametrize("retain", [0.5, 0.9])
def test_report(tmp_path: Path, retain: float) -> None:
    """One criterion beats chance, the other doesn't; the report says so."""
    chance = [1, 0] * 100
    cells = [
        cell("random", (1, 2), chance, 0.5),
        cell("himap", (1, 2), [1, 1, 1, 0] * 50, 0.5),
        cell("fastv", (1, 2), [*chance[:-2], 0, 1], 0.5),
    ]
    findings = Findings(
        about={"model": "m", "data": "d", "num_questions": 200, "num_groups": 200},
        reference=result([1] * 200, 1.0),
        cells=cells,
        groups=[str(i) for i in range(200)],
        retain=retain,
    )
    draw = retain == 0.5
    write_report(tmp_path, findings, draw=draw)
    text = (tmp_path / "report.md").read_text()
    assert "| criterion | 50.0 %, R = (0.5, 0.75) |" in text
    assert re.search(r"\| random \| 50.0 % \(43.\d to 5\d.\d\) \|", text)
    assert re.search(r"\| himap \| 75.0 % \(69.\d to 8\d.\d\) \|", text)
    assert "| unpruned | 100 % |\n| random | 50 % |\n| himap | 75 % |" in text
    assert "himap: better in 1, no different in 0, worse in 0" in text
    assert "fastv: better in 0, no different in 1, worse in 0" in text
    assert (tmp_path / "report.png").exists() == draw
    if draw:
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "report.json").read_text())
    assert [value["criterion"] for value in values["cells"]] == ["random", "himap", "fastv"]
    if retain == 0.5:
        settings = json.loads((tmp_path / "recommended.json").read_text())
        assert settings["shallow_layer"] == 1
        assert settings["deep_ratio"] == 0.75
    else:
        assert "No setting keeps 90 % of the accuracy; the most is 75.0 %" in text
        assert not (tmp_path / "recommended.json").exists()


def test_grid(tmp_path: Path) -> None:
    cells = [cell("himap", (1, 2), [1] * 99 + [0], 0.5), cell("himap", (1, 3), [0, 1] * 50, 0.6)]
    findings = Findings(
        about={"model": "m", "data": "d", "num_questions": 100, "num_groups": 100},
        reference=result([1] * 100, 1.0),
        cells=cells,
        groups=[str(i) for i in range(100)],
        retain=0.98,
    )
    shown = write_grid(tmp_path, findings, draw=True)
    front = shown.split("Pareto front")[1]
    assert "| himap | 1, 2 | 0.5, 0.75 | 99.0 % | 99.0 % (9" in front
    assert "| himap | 1, 3 |" not in front
    assert "**Recommended** (fewest prefill FLOPs that keep 98 %): himap, K = (1, 2)" in shown
    assert "| himap | 1, 3 |" in (tmp_path / "sweep.md").read_text()
