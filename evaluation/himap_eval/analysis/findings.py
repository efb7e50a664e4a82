# SPDX-License-Identifier: Apache-2.0
"""What the observations of all questions come to: means by layer, and the shift layer.

The paper's saliency weighs attention by the gradient of the loss. An engine for inference has no
gradients. Here its sums are those of attention itself, and the effect of blocking a flow, which the
gradient estimates, is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from himap_vllm.plan.prior import resampled

from .flows import IMAGE, SYSTEM, TEXT
from .measure import FloatArray, Observation

NUM_PLACES = 48  # to which the tokens of an image are resampled


@dataclass(frozen=True, slots=True)
class LayerMeans:
    """Means over questions for one layer; None where a prompt has no such tokens.

    Attributes:
        layer: its number, from 0.
        S_sys, S_img, S_ins: attention that a token of the system prompt, of an image, of the
            instruction gets from all others: the paper's Eq. 2 to 4.
        S_vv, S_vt: attention that an image token gets from image tokens, and from the instruction:
            Eq. 5 and 6.
        S_tt: attention that a token of the instruction gets from the instruction.
        bias: log(S_vv / S_vt), Eq. 7.
        text_to_image: share of its attention that a row of the instruction pays to images.
        image_to_image: share of its attention that an image's row pays to images.
        entropy_text, entropy_image: of the attention of such rows, in nats.
        similarity_text, similarity_image: cosine of such tokens' states before and behind.
    """

    layer: int
    S_sys: float | None
    S_img: float | None
    S_ins: float | None
    S_vv: float | None
    S_vt: float | None
    S_tt: float | None
    bias: float | None
    text_to_image: float | None
    image_to_image: float | None
    entropy_text: float | None
    entropy_image: float | None
    similarity_text: float | None
    similarity_image: float | None


@dataclass(frozen=True, slots=True)
class EffectMeans:
    """Means over questions of what blocking did.

    Attributes:
        layers: first blocked layer, and the one behind the last.
        loss: of the answer's log-probability, in nats.
        error: standard error of `loss`.
        same: share of answers that stay the same.
        overlap: of the five likeliest first tokens.
    """

    layers: tuple[int, int]
    loss: float
    error: float
    same: float
    overlap: float


def layer_means(observations: Sequence[Observation]) -> list[LayerMeans]:
    """Average over questions."""
    own = [_of_question(observation) for observation in observations]
    means = {name: np.mean([one[name] for one in own], axis=0) for name in own[0]}
    with np.errstate(divide="ignore", invalid="ignore"):
        means["bias"] = np.log(means["S_vv"] / means["S_vt"])
    return [
        LayerMeans(layer, **{name: _finite(values[layer]) for name, values in means.items()})
        for layer in range(len(means["bias"]))
    ]


def _of_question(seen: Observation) -> dict[str, FloatArray]:
    """[num_layers] each of the numbers of `LayerMeans` but the bias."""
    mass, counts = seen.mass, seen.counts
    readers = mass.sum(axis=1)  # [num_layers, 4] attention that a class gets
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "S_sys": readers[:, SYSTEM] / counts[SYSTEM],
            "S_img": readers[:, IMAGE] / counts[IMAGE],
            "S_ins": readers[:, TEXT] / counts[TEXT],
            "S_vv": mass[:, IMAGE, IMAGE] / counts[IMAGE],
            "S_vt": mass[:, TEXT, IMAGE] / counts[IMAGE],
            "S_tt": mass[:, TEXT, TEXT] / counts[TEXT],
            "text_to_image": mass[:, TEXT, IMAGE] / counts[TEXT],
            "image_to_image": mass[:, IMAGE, IMAGE] / counts[IMAGE],
            "entropy_text": seen.entropy[:, TEXT],
            "entropy_image": seen.entropy[:, IMAGE],
            "similarity_text": seen.similarity[:, 1],
            "similarity_image": seen.similarity[:, 0],
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def effect_means(
    observations: Sequence[Observation], windows: Sequence[tuple[int, int]]
) -> dict[str, list[EffectMeans]]:
    """Average over questions, by name of the blocked flow."""
    num_layers = windows[-1][1]
    found: dict[str, list[EffectMeans]] = {}
    for name in observations[0].effects:
        found[name] = []
        for place, (begin, end) in enumerate(windows):
            effects = [seen.effects[name][place] for seen in observations]
            losses = np.array([effect.loss for effect in effects])
            spread = losses.std(ddof=1) if len(losses) > 1 else 0.0
            found[name].append(
                EffectMeans(
                    layers=(begin, num_layers if name == "dropped" else end),
                    loss=float(losses.mean()),
                    error=float(spread / np.sqrt(len(losses))),
                    same=float(np.mean([effect.same for effect in effects])),
                    overlap=float(np.mean([effect.overlap for effect in effects])),
                )
            )
    return found


def by_place(observations: Sequence[Observation], name: str) -> FloatArray:
    """[num_layers, NUM_PLACES] attention that the places of an image get, 1 on average.

    Args:
        observations: of all questions.
        name: `from_text` or `from_image`.
    """
    rows = []
    for seen in observations:
        values: FloatArray = getattr(seen, name)
        begin = 0
        for size in seen.image_sizes:
            own = values[:, begin : begin + size]
            begin += size
            rows.append([resampled(layer, NUM_PLACES) for layer in own])
    mean = np.mean(rows, axis=0)
    return np.asarray(mean / np.maximum(mean.mean(axis=1, keepdims=True), 1e-12))


def shift(shallow: Sequence[float], deep: Sequence[float]) -> int:
    """Where `shallow` stops and `deep` starts to be the larger one.

    The place that splits best: the sum of `shallow - deep` before it is largest. 0 if `deep` is
    larger all the way, `len(deep)` if `shallow` is.
    """
    lead = np.concatenate([[0.0], np.cumsum(np.subtract(shallow, deep))])
    return int(lead.argmax())


def shift_layer(effects: dict[str, list[EffectMeans]]) -> int:
    """First layer from which on blocking image to image costs more than image to text."""
    to_text, to_image = effects["image_to_text"], effects["image_to_image"]
    place = shift([one.loss for one in to_text], [one.loss for one in to_image])
    return to_text[place].layers[0] if place < len(to_text) else to_text[-1].layers[1]


def layer_weights(effects: dict[str, list[EffectMeans]]) -> FloatArray:
    """[num_layers] how much each layer's reading of the image matters to the answer; sum 1.

    What it costs to drop the images one layer earlier. Blocking a layer alone would say less: other
    layers read what it can't. Shared out evenly in a window.
    """
    costs = np.minimum.accumulate([max(0.0, one.loss) for one in effects["dropped"]])
    ends = [one.layers[1] for one in effects["image_to_text"]]
    sizes = np.diff([0, *ends])
    weights = np.repeat(-np.diff([*costs, 0.0]) / sizes, sizes)
    total = float(weights.sum())
    return np.full(len(weights), 1 / len(weights)) if not total else weights / total


def as_lists(values: FloatArray, digits: int = 3) -> list[Any]:
    """Rounded, for JSON."""
    found: list[Any] = np.round(values, digits).tolist()
    return found
