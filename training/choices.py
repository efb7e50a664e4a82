# SPDX-License-Identifier: Apache-2.0
"""Criteria in plain PyTorch, over a batch of questions: those of the engine, and more.

Written from the definitions, apart from `himap_vllm.criteria`. Some were tried here only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Seen:
    """What a criterion may look at: the n image tokens that reach a cut, of each question.

    Attributes:
        keep: how many stay.
        text: [batch, n] attention of the question's rows in the layer before, their mean.
        first_row: [batch, n] attention of the first text row, which asks nothing.
        last_row: [batch, n] attention of the question's last row.
        own: [batch, n] attention of the image tokens themselves, their mean.
        prior: [batch, n] mean of `text` at the token's place over other pictures.
        states: [batch, n, width] at the cut.
        before: [batch, n, width] one layer earlier.
    """

    keep: int
    text: Tensor
    first_row: Tensor
    last_row: Tensor
    own: Tensor
    prior: Tensor
    states: Tensor
    before: Tensor

    @property
    def relevance(self) -> Tensor:
        """[batch, n] attention without position bias (D2Pruner, arXiv 2512.19443)."""
        return self.text / self.prior


def highest(scores: Tensor, keep: int) -> Tensor:
    """[batch, keep] the highest of scores [batch, n], ascending."""
    return scores.topk(keep, 1).indices.sort(1).values


def uniform(seen: Seen) -> Tensor:
    batch, n = seen.text.shape
    middles = (2 * torch.arange(seen.keep) + 1) * n // (2 * seen.keep)
    return middles.expand(batch, -1)


def random(seen: Seen) -> Tensor:
    return highest(torch.rand(seen.text.shape), seen.keep)


def best_of_stretches(scores: Tensor, keep: int) -> Tensor:
    """[batch, keep] the highest of each of `keep` equal stretches of the raster."""
    n = scores.shape[1]
    edges = [i * n // keep for i in range(keep + 1)]
    best = [scores[:, begin:end].argmax(1) + begin for begin, end in pairwise(edges)]
    return torch.stack(best, 1)


def distances(states: Tensor) -> Tensor:
    """[batch, n, n] one minus the cosine similarity of the centred states."""
    unit = normalize(states - states.mean(1, keepdim=True), dim=-1)
    return 1 - unit @ unit.transpose(1, 2)


def farthest(states: Tensor, keep: int, weight: Tensor | None = None) -> Tensor:
    """[batch, keep] greedy max-min distance (DivPrune, arXiv 2503.02175), weighted by `weight`.

    It starts with the token of the highest weight, without weights with the one whose nearest
    neighbour is farthest.
    """
    distance = distances(states)
    batch = torch.arange(len(states))
    weights = torch.ones(distance.shape[:2]) if weight is None else weight
    diagonal = torch.eye(distance.shape[1]) * float(distance.shape[1])
    start = (distance + diagonal).amin(1) if weight is None else weight
    chosen = [start.argmax(1)]
    nearest = distance[batch, chosen[0]]
    while len(chosen) < keep:
        score = (nearest * weights).scatter(1, torch.stack(chosen, 1), -1.0)
        chosen.append(score.argmax(1))
        nearest = nearest.minimum(distance[batch, chosen[-1]])
    return torch.stack(chosen, 1).sort(1).values


def most_volume(states: Tensor, keep: int, relevance: Tensor) -> Tensor:
    """[batch, keep] greedy conditional DPP (CDPruner, arXiv 2506.10967)."""
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    weight = (relevance - low) / (high - low).clamp(min=1e-9) + 1e-3
    kernel = weight[:, :, None] * (1 - distances(states) / 2) * weight[:, None, :]
    batch = torch.arange(len(states))
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(len(states), 0, kernel.shape[1])
    chosen: list[Tensor] = []
    while len(chosen) < keep:
        best = gain.argmax(1)
        shared = torch.einsum("bi,bin->bn", rows[batch, :, best], rows)
        row = (kernel[batch, best] - shared) / gain[batch, best].clamp(min=1e-12).sqrt()[:, None]
        rows = torch.cat([rows, row[:, None]], 1)
        chosen.append(best)
        gain = (gain - row**2).scatter(1, torch.stack(chosen, 1), float("-inf"))
    return torch.stack(chosen, 1).sort(1).values


def prior_tr(seen: Seen) -> Tensor:
    """PriorTR (arXiv 2606.24156): P log(P / Q), Q the attention of a row that asks nothing."""
    asked, null = (x / x.sum(1, keepdim=True) for x in (seen.text, seen.first_row))
    return highest(asked * (asked / null.clamp(min=1e-9)).log(), seen.keep)


def half_even(scores: Tensor, keep: int) -> Tensor:
    """[batch, keep] half of the tokens evenly spaced (rounded down), the others by `scores`."""
    batch, n = scores.shape
    half = keep // 2
    middles = ((2 * torch.arange(half) + 1) * n // (2 * max(1, half))).expand(batch, -1)
    return highest(scores.scatter(1, middles, float("inf")), keep)


CHOICES: dict[str, Callable[[Seen], Tensor]] = {
    "text": lambda seen: highest(seen.text, seen.keep),
    "own": lambda seen: highest(seen.own, seen.keep),
    "fastv": lambda seen: highest(seen.last_row, seen.keep),
    "random": random,
    "uniform": uniform,
    "diversity": lambda seen: farthest(seen.states, seen.keep),
    "stratified": lambda seen: best_of_stretches(seen.text, seen.keep),
    "debiased": lambda seen: highest(seen.relevance, seen.keep),
    "half": lambda seen: half_even(seen.text, seen.keep),
    # Not in the engine.
    "prior": prior_tr,
    "change": lambda seen: highest((seen.states - seen.before).norm(dim=-1), seen.keep),
    "half-debiased": lambda seen: half_even(seen.relevance, seen.keep),
    "stratified-debiased": lambda seen: best_of_stretches(seen.relevance, seen.keep),
    "spread": lambda seen: farthest(seen.states, seen.keep, seen.relevance.sqrt()),
    "dpp": lambda seen: most_volume(seen.states, seen.keep, seen.relevance),
}
"""By name. The paper's criterion is `text` at the first cut and `own` at the second."""
