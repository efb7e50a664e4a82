# SPDX-License-Identifier: Apache-2.0
"""Criteria outside the engine, and steps of training that prune, against slow definitions."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from training.choices import CHOICES, Seen, best_of_stretches, distances, farthest, most_volume
from training.criteria import Batch, Cuts, Model, Sample, pair_of, right, samples, table
from training.export import export
from training.model import IMAGE_TOKENS, Cut, answer_logits, build_config, image_features
from training.tokenizer import build_tokenizer

LAYERS = (1, 5)


def seen(n: int = 12, keep: int = 5, batch: int = 3) -> Seen:
    torch.manual_seed(n + keep)
    text, first, last, own, prior = (torch.rand(batch, n) + 0.01 for _ in range(5))
    states, before = torch.randn(2, batch, n, 6)
    return Seen(keep, text, first, last, own, prior, states, before)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("n", "keep"), [(12, 5), (12, 1), (12, 12), (7, 3)])
def test_as_many_as_asked_each_once_in_order(name: str, n: int, keep: int) -> None:
    kept = CHOICES[name](seen(n, keep))
    assert kept.shape == (3, keep)
    for row in kept.tolist():
        assert row == sorted(set(row))
        assert set(row) <= set(range(n))


def test_even_spacing_takes_the_middles_of_equal_parts() -> None:
    assert CHOICES["uniform"](seen(12, 3))[0].tolist() == [2, 6, 10]
    assert CHOICES["uniform"](seen(9, 2))[0].tolist() == [2, 6]


def test_the_best_of_each_stretch() -> None:
    scores = torch.tensor([[1.0, 3, 2, 5, 4, 9, 0]])
    assert best_of_stretches(scores, 3).tolist() == [[1, 3, 5]]


def test_farthest_is_greedy_max_min() -> None:
    states = seen(9, 4).states
    for weight in (None, torch.rand(3, 9) + 0.1):
        kept = farthest(states, 4, weight)
        for row in range(3):
            distance = distances(states)[row]
            w = np.ones(9) if weight is None else weight[row].numpy()
            nearest = [min(float(distance[i, j]) for j in range(9) if j != i) for i in range(9)]
            chosen = [int(np.argmax(nearest if weight is None else w))]
            while len(chosen) < 4:
                reach = [
                    -1.0 if i in chosen else w[i] * min(float(distance[i, j]) for j in chosen)
                    for i in range(9)
                ]
                chosen.append(int(np.argmax(reach)))
            assert sorted(chosen) == kept[row].tolist()


def test_most_volume_is_greedy_in_the_determinant() -> None:
    given = seen(8, 3)
    kept = most_volume(given.states.double(), 3, given.relevance.double())
    for row in range(3):
        relevance = given.relevance[row].double()
        weight = (relevance - relevance.min()) / (relevance.max() - relevance.min()) + 1e-3
        similarity = 1 - distances(given.states.double())[row] / 2
        kernel = weight[:, None] * similarity * weight
        chosen: list[int] = []
        while len(chosen) < 3:
            rest = [i for i in range(8) if i not in chosen]
            volumes = [float(kernel[[*chosen, i]][:, [*chosen, i]].det()) for i in rest]
            chosen.append(rest[int(np.argmax(volumes))])
        assert sorted(chosen) == kept[row].tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(scenes=100)
    torch.manual_seed(0)
    export(LlavaForConditionalGeneration._from_config(build_config(tokenizer)), tokenizer, folder)
    return Model(folder)


def test_a_pruned_question_equals_the_step_of_training_that_keeps_the_same(model: Model) -> None:
    """Two forward passes, written apart; the answer is what the other one says."""
    sample = samples(model, 0, 1, 2, second=False)[0]
    batch = Batch.of(model, [sample])
    length = batch.tokens.shape[1]
    segments = (torch.arange(length) >= len(model.prefix)).long()[None]
    positions = torch.arange(length)[None]
    for shallow, deep in ((162, 40), (13, 1)):
        first = ((2 * torch.arange(shallow) + 1) * IMAGE_TOKENS // (2 * shallow))[None]
        second = ((2 * torch.arange(deep) + 1) * shallow // (2 * deep))[None]
        cuts = [Cut(1, kept=first), Cut(5, kept=second)]
        with torch.no_grad():
            features = image_features(model.llava, batch.pixels)
            rows = (batch.tokens, positions, segments, segments.bool())
            says = answer_logits(model.llava, features, *rows, cuts).argmax(-1)
        # The logits are those of the token before.
        at = batch.answers.nonzero()[:, 1]
        prior = (torch.ones(IMAGE_TOKENS),) * 2
        tried = Cuts(LAYERS, (shallow, deep), [("uniform", "uniform")], prior)
        for change, expected in ((0, True), (1, False)):
            asked = batch.tokens.clone()
            # One token: what is said behind it would depend on it.
            only = torch.zeros_like(batch.answers)
            only[0, at[0]] = True
            asked[0, len(model.prefix) + at[0]] = (says[0, at[0]] + change) % 400
            found = right(model, replace(batch, tokens=asked, answers=only), tried)
            assert found[("uniform", "uniform")].tolist() == [expected]


def test_all_tokens_kept_change_nothing(model: Model) -> None:
    batch = Batch.of(model, samples(model, 0, 2, 2, second=True))
    prior = (torch.ones(IMAGE_TOKENS),) * 2
    names = [(name, name) for name in ("uniform", "text", "diversity")]
    (unpruned,) = right(model, batch, Cuts(LAYERS, prior=prior)).values()
    pruned = right(model, batch, Cuts(LAYERS, (IMAGE_TOKENS,) * 2, names, prior))
    assert list(pruned) == sorted(names)
    assert all(row.tolist() == unpruned.tolist() for row in pruned.values())


def test_a_second_question_is_chosen_by_the_first(model: Model) -> None:
    found = samples(model, 0, 5, 2, second=True)
    assert found
    for sample in found:
        text = model.tokenizer.decode(sample.tokens)
        asked = model.tokenizer.decode(sample.tokens[: sample.voters])
        assert text.count("ASSISTANT:") == 2
        assert text.startswith(asked)
        assert asked.count("?") == 1


def test_the_best_criterion_comes_first() -> None:
    pixels = torch.empty(0)
    found = [Sample(pixels, [], 0, 0, "color", "small objects", scene) for scene in range(4)]
    lines = table(
        found,
        [1.0, 1, 1, 0],
        {("uniform", "uniform"): [1.0, 1, 0, 0], ("text", "own"): [1.0, 1, 1, 0]},
    ).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| unpruned", "| text+own", "| uniform"]
    assert "66.7 %" in lines[4]
    assert lines[3].endswith("| 75 | 75 |")


def test_pairs_by_name() -> None:
    assert pair_of("uniform") == ("uniform", "uniform")
    assert pair_of("uniform+dpp") == ("uniform", "dpp")
    with pytest.raises(argparse.ArgumentTypeError, match="is not of"):
        pair_of("uniform+best")
    assert all(pair_of("+".join(pair)) == pair for pair in combinations(CHOICES, 2))
