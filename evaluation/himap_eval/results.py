# SPDX-License-Identifier: Apache-2.0
"""Computes accuracy, retention and savings from answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from himap_vllm.plan.prompt import Ratios

from .client import Answer
from .items import Item
from .scoring import METRICS, normalized
from .stats import Retention, retention


@dataclass(frozen=True, slots=True)
class KindResult:
    """One kind of question, or those with one tag, at one setting."""

    num_items: int
    accuracy: float
    retention: Retention


@dataclass(frozen=True, slots=True)
class Savings:
    """What pruning saved, averaged over the questions.

    Attributes:
        image_tokens: image tokens per question.
        kept_shallow: those of them that are kept between the cuts.
        kept_deep: those of them that are kept after both cuts.
        image_token_layers: share that is left of the image tokens, summed over the layers; one
            minus this is the "average reduction" of the literature.
        kv_tokens: share that is left of the prompt's KV entries, summed over the layers, text
            included.
        prefill_flops: share that is left of the decoder's prefill FLOPs, text included.
    """

    image_tokens: float
    kept_shallow: float
    kept_deep: float
    image_token_layers: float
    kv_tokens: float
    prefill_flops: float

    @property
    def kept(self) -> str:
        """Image tokens after the cuts, as text."""
        return f"{self.kept_shallow:.0f}, {self.kept_deep:.0f} of {self.image_tokens:.0f}"

    @property
    def shares(self) -> list[float]:
        """What is left of image token-layers, KV tokens and prefill FLOPs."""
        return [self.image_token_layers, self.kv_tokens, self.prefill_flops]


@dataclass(frozen=True, slots=True)
class Result:
    """One setting.

    Attributes:
        ratios: ratios of the requests.
        accuracy: mean score, in [0, 1].
        retention: accuracy as a share of the unpruned accuracy.
        agreement: share of answers that equal the unpruned ones, right or wrong.
        kinds: accuracy and retention per kind of question, and behind them per tag.
        savings: None if the server reports none.
        ttft: median seconds to the first token, under the load of this run.
        latency: median seconds of a request, under the load of this run.
    """

    ratios: Ratios
    accuracy: float
    retention: Retention
    agreement: float
    kinds: dict[str, KindResult]
    savings: Savings | None
    ttft: float
    latency: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def scores_of(items: Sequence[Item], answers: Sequence[Answer]) -> list[float]:
    """[num_items] in [0, 1]. Items that count together have the lowest of their scores."""
    scores = [
        METRICS[item.metric](answer.text, item.answers)
        for item, answer in zip(items, answers, strict=True)
    ]
    lowest: dict[str, float] = {}
    for item, score in zip(items, scores, strict=True):
        lowest[item.together] = min(score, lowest.get(item.together, score))
    return [
        lowest[item.together] if item.together else score
        for item, score in zip(items, scores, strict=True)
    ]


def answered(items: Sequence[Item], answers: dict[Ratios, list[Answer]]) -> list[int]:
    """Indices of the items that have an answer at every setting, as all that count with them do."""
    failed = [any(row[i].error for row in answers.values()) for i in range(len(items))]
    spoiled = {item.together for item, own in zip(items, failed, strict=True) if own} - {""}
    return [i for i, item in enumerate(items) if not failed[i] and item.together not in spoiled]


def summarize(
    items: Sequence[Item],
    ratios: Ratios,
    answers: Sequence[Answer],
    unpruned: Sequence[Answer],
) -> Result:
    """One setting's numbers; `answers` and `unpruned` are in the order of `items`."""
    scores, reference = scores_of(items, answers), scores_of(items, unpruned)
    groups = [item.group for item in items]
    kinds = {}
    tags = {item.tag for item in items} - {""}
    for kind in (*sorted({item.kind for item in items}), *sorted(tags)):
        own = [i for i, item in enumerate(items) if kind in (item.kind, item.tag)]
        kinds[kind] = KindResult(
            num_items=len(own),
            accuracy=statistics.fmean(scores[i] for i in own),
            retention=retention(
                [scores[i] for i in own], [reference[i] for i in own], [groups[i] for i in own]
            ),
        )
    same = [
        normalized(mine.text) == normalized(theirs.text)
        for mine, theirs in zip(answers, unpruned, strict=True)
    ]
    return Result(
        ratios=ratios,
        accuracy=statistics.fmean(scores),
        retention=retention(scores, reference, groups),
        agreement=statistics.fmean(same),
        kinds=kinds,
        savings=_savings(answers),
        ttft=statistics.median(answer.ttft for answer in answers),
        latency=statistics.median(answer.latency for answer in answers),
    )


def _savings(answers: Sequence[Answer]) -> Savings | None:
    usages = [(answer.usage, answer.prompt_tokens) for answer in answers if answer.usage]
    if len(usages) < len(answers):
        return None
    mean = {
        key: statistics.fmean(usage[key] for usage, _ in usages)
        for key in ("image_tokens", "kept_shallow", "kept_deep", "prefill_flops_ratio")
    }
    held = sum(usage["kv_tokens"] for usage, _ in usages)
    full = sum(usage["kv_tokens_unpruned"] for usage, _ in usages)
    # The unpruned KV cache has every token of the prompt in every layer.
    image_token_layers = sum(
        usage["image_tokens"] * usage["kv_tokens_unpruned"] / prompt_tokens
        for usage, prompt_tokens in usages
    )
    return Savings(
        image_tokens=mean["image_tokens"],
        kept_shallow=mean["kept_shallow"],
        kept_deep=mean["kept_deep"],
        image_token_layers=1 - (full - held) / image_token_layers,
        kv_tokens=held / full,
        prefill_flops=mean["prefill_flops_ratio"],
    )
