# SPDX-License-Identifier: Apache-2.0
"""`himap analyze`: its arithmetic, against whole attention maps and by hand."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from himap_eval.analysis import flows
from himap_eval.analysis.cuts import Cuts, all_cuts, memory_cost, recommended
from himap_eval.analysis.findings import (
    by_place,
    effect_means,
    layer_means,
    layer_weights,
    shift,
    shift_layer,
)
from himap_eval.analysis.measure import Effect, Observation, classes_of, windows_of
from himap_eval.analysis.svg import heat_map, line_chart
from himap_eval.analyze import check_depth
from himap_eval.errors import CommandError

from himap_vllm.plan.prompt import Ratios

SYSTEM, IMAGE, TEXT, MARK = range(4)
CLASSES = [SYSTEM] * 2 + [IMAGE] * 3 + [MARK] + [IMAGE] * 3 + [TEXT] * 4
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = len(CLASSES), 6, 2, 8


@pytest.fixture(params=[1, 10**9], ids=["row by row", "at once"])
def tensors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(flows, "_MAX_PROBABILITIES", request.param)
    torch.manual_seed(0)
    return {
        "query": 2 * torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_SIZE),
        "key": 2 * torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE),
        "value": torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE),
    }


def whole_map(tensors: dict[str, torch.Tensor], banned: torch.Tensor | None = None) -> torch.Tensor:
    """[heads, n, n], each key and value head repeated for its queries."""
    keys = tensors["key"].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    logits = torch.einsum("qhd,khd->hqk", tensors["query"], keys) * 0.3
    hidden = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)
    if banned is not None:
        hidden |= banned
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def test_sums_of_a_layer_equal_those_of_its_whole_map(tensors: dict[str, torch.Tensor]) -> None:
    classes = torch.tensor(CLASSES)
    found = flows.layer_flows(tensors["query"], tensors["key"], 0.3, classes)
    heads = whole_map(tensors)
    mean = heads.mean(0)
    for reader in range(4):
        rows = classes == reader
        for read in range(4):
            expected = mean[rows][:, classes == read].sum()
            torch.testing.assert_close(found.mass[reader, read], expected)
        entropy = torch.special.entr(heads).sum(-1).mean(0)[rows].mean()
        torch.testing.assert_close(found.entropy[reader], entropy)
    columns = mean[:, classes == IMAGE]
    torch.testing.assert_close(found.from_text, columns[classes == TEXT].sum(0))
    torch.testing.assert_close(found.from_image, columns[classes == IMAGE].sum(0))


@pytest.mark.parametrize("block", [flows.IMAGE_TO_TEXT, flows.IMAGE_TO_IMAGE, flows.DROPPED])
def test_blocked_rows_equal_a_whole_map_with_places_cut(
    tensors: dict[str, torch.Tensor], block: flows.Block
) -> None:
    classes = torch.tensor(CLASSES)
    reads = torch.isin(classes, torch.tensor(block.readers))
    cut = reads[:, None] & (classes == IMAGE)
    attention = whole_map(tensors, cut if block.renormalized else None).masked_fill(cut, 0)
    values = tensors["value"].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    expected = torch.einsum("hqk,khd->qhd", attention, values)
    rows, found = flows.blocked_rows(**tensors, scale=0.3, classes=classes, block=block)
    assert rows.tolist() == reads.nonzero().squeeze(-1).tolist()
    torch.testing.assert_close(found, expected[rows])


class Range:
    """As vLLM's `PlaceholderRange`."""

    def __init__(self, *runs: tuple[int, int]) -> None:
        self.runs = runs

    def extract_embeds_range(self) -> tuple[tuple[int, int], ...]:
        return self.runs


def test_classes_of_a_prompt_with_two_images() -> None:
    found = classes_of(12, [Range((2, 3), (5, 6)), Range((9, 9))])
    assert (
        found
        == [SYSTEM] * 2 + [IMAGE] * 2 + [MARK] + [IMAGE] * 2 + [TEXT] * 2 + [IMAGE] + [TEXT] * 2
    )


def test_windows_cover_all_layers_once() -> None:
    for num_layers in (1, 12, 16, 17, 28, 32, 80):
        windows = windows_of(num_layers)
        assert [layer for window in windows for layer in range(*window)] == list(range(num_layers))
        assert len(windows) <= 16


NUM_LAYERS = 4


def observation(**changes: object) -> Observation:
    """Four layers, one image of four tokens; the instruction reads it in layers 0 and 1."""
    from_text = np.array([[4, 3, 2, 1], [1, 1, 1, 5], [4, 3, 2, 1], [4, 3, 2, 1.0]])
    losses = {
        "image_to_text": (6, 2, 0, 0),
        "image_to_image": (1, 1, 3, 0),
        "dropped": (9, 3, 0, 0),
    }
    mass = np.tile(np.arange(16.0).reshape(4, 4), (NUM_LAYERS, 1, 1))
    made = Observation(
        counts=np.array([2, 4, 5, 0.0]),
        image_sizes=(4,),
        answer=(7,),
        logprob=-0.1,
        mass=mass,
        from_text=from_text,
        from_image=from_text[:, ::-1].copy(),
        entropy=np.ones((NUM_LAYERS, 4)),
        similarity=np.tile([0.5, 0.75], (NUM_LAYERS, 1)),
        effects={
            name: [Effect(float(loss), loss < 2, 1 / (1 + loss)) for loss in own]
            for name, own in losses.items()
        },
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_means_by_layer_are_the_papers_sums() -> None:
    first = layer_means([observation(), observation()])[0]
    assert (first.S_vv, first.S_vt, first.S_tt) == (5 / 4, 9 / 4, 10 / 5)
    assert (first.S_sys, first.S_img, first.S_ins) == (24 / 2, 28 / 4, 32 / 5)
    assert first.bias == pytest.approx(np.log(5 / 9))
    assert (first.text_to_image, first.image_to_image) == (9 / 5, 5 / 4)
    assert (first.similarity_image, first.similarity_text) == (0.5, 0.75)


def test_a_class_without_tokens_has_no_mean() -> None:
    bare = layer_means([observation(counts=np.array([0, 4, 5, 0.0]))])[0]
    assert bare.S_sys is None
    assert bare.S_vv is not None


def test_effects_are_averaged_and_the_shift_is_where_they_cross() -> None:
    windows = [(layer, layer + 1) for layer in range(NUM_LAYERS)]
    effects = effect_means([observation(), observation()], windows)
    assert [one.loss for one in effects["image_to_text"]] == [6, 2, 0, 0]
    assert [one.same for one in effects["image_to_text"]] == [0, 0, 1, 1]
    assert [one.layers for one in effects["dropped"]] == [(layer, 4) for layer in range(4)]
    assert shift_layer(effects) == 2
    assert layer_weights(effects) == pytest.approx([6 / 9, 3 / 9, 0, 0])


@pytest.mark.parametrize(
    ("shallow", "deep", "place"),
    [
        ([3, 2, 0, 0], [0, 1, 2, 2], 2),
        ([3, 0, 3, 0], [0, 1, 0, 2], 3),  # one layer out of line does not end it
        ([0, 0], [1, 1], 0),
        ([1, 1], [0, 0], 2),
    ],
)
def test_shift_is_the_best_split(shallow: list[float], deep: list[float], place: int) -> None:
    assert shift(shallow, deep) == place


def test_cuts_lose_the_reading_of_dropped_tokens() -> None:
    weights = np.array([0.0, 0.5, 0.25, 0.25])
    by_layers = {
        (one.shallow_layer, one.deep_layer): one
        for one in all_cuts([observation()], weights, Ratios(0.5, 0.5), 1)
    }
    assert set(by_layers) == {(1, 2), (1, 3), (2, 3)}
    # Layer 0 keeps tokens 0 and 1. Of layer 1's reading, 6 of 8 go to the others.
    first = by_layers[1, 3]
    # Layer 2's image rows prefer later tokens: of these two, token 1 stays.
    assert first.lost == pytest.approx(0.5 * 6 / 8 + 0.25 * 3 / 10 + 0.25 * 7 / 10)
    assert first.token_layers == (1 + 2 * 0.5 + 1 * 0.25) / 4
    # Layer 1 keeps tokens 3 and, of equals, 0.
    assert by_layers[2, 3].lost == pytest.approx(0.25 * 5 / 10 + 0.25 * 9 / 10)
    assert all(
        one.shallow_layer > 1 for one in all_cuts([observation()], weights, Ratios(0.5, 0.5), 2)
    )


def test_recommended_cuts_lose_and_leave_least_and_few_groups_decide_close_calls() -> None:
    cuts = {pair: Cuts(*pair, lost, 0.3) for pair, lost in (((1, 5), 0.4), ((5, 6), 0.1))}
    assert recommended(list(cuts.values()), 12) == cuts[5, 6]
    close = Cuts(4, 8, 0.14, 0.3)  # 3 groups, not 12
    assert recommended([*cuts.values(), close], 12) == close
    wasteful = Cuts(5, 7, 0.06, 0.3)  # 7 groups, but 14 % of the memory is wasted
    assert recommended([*cuts.values(), wasteful], 12) == cuts[5, 6]


def test_ratios_of_zero_lose_nothing() -> None:
    weights = np.full(NUM_LAYERS, 0.25)
    for one in all_cuts([observation()], weights, Ratios(0.0, 0.0), 1):
        assert one.lost == pytest.approx(0)
        assert one.token_layers == 1


def test_each_image_keeps_its_own_share() -> None:
    weights = np.array([0.0, 0.0, 0.0, 1.0])
    two = observation(image_sizes=(2, 2))
    (one,) = all_cuts([two], weights, Ratios(0.5, 0.0), 2)
    # Layer 1 keeps token 0 of the first image and token 3 of the second.
    assert one.lost == pytest.approx(5 / 10)


def test_memory_of_the_default_cuts_of_32_layers() -> None:
    cost = memory_cost(2, 8, 32)
    assert (cost.num_groups, cost.num_groups_few) == (6, 3)
    assert cost.wasted == 0


def test_places_of_images_of_all_sizes_are_relative_to_their_mean() -> None:
    both = [observation(), observation(image_sizes=(2, 2))]
    places = by_place(both, "from_text")
    assert places.shape[0] == NUM_LAYERS
    assert places.mean(axis=1) == pytest.approx(1)


def test_charts_are_well_formed() -> None:
    chart = line_chart("<a>", {"x & y": [1.0, None, -3.0]}, "nats", marks={"K1": 0.5})
    flat = line_chart("flat", {"none": [None, None]}, "")
    for text in (chart, flat, heat_map("b", [[0, 1], [2, 3]], "place"), heat_map("0", [[0]], "")):
        assert ElementTree.fromstring(text).tag == "svg"


@pytest.mark.parametrize(("num_layers", "first_cut"), [(2, 1), (4, 3)])
def test_a_decoder_without_room_for_two_cuts_is_refused(num_layers: int, first_cut: int) -> None:
    check_depth(num_layers + 1, first_cut)
    with pytest.raises(CommandError, match=f"{num_layers} layers"):
        check_depth(num_layers, first_cut)
