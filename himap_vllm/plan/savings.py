# SPDX-License-Identifier: Apache-2.0
"""The KV entries and the decoder's prefill FLOPs that a plan saves. Arithmetic without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from himap_vllm.plan.prompt import NUM_STAGES, PromptPlan


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Dimensions of a dense decoder with gated MLP and grouped-query attention."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    def layer_flops(self, num_tokens: int) -> int:
        """FLOPs of one layer's prefill over `num_tokens` tokens (a multiply-add counts as two).

        Projections, the three matrices of the gated MLP, and causal attention's two products.
        """
        query, key_value = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        weights = (
            self.hidden_size * (2 * query + 2 * key_value)
            + 3 * self.hidden_size * self.intermediate_size
        )
        pairs = num_tokens * (num_tokens + 1) // 2
        return 2 * num_tokens * weights + 4 * pairs * query


@dataclass(frozen=True, slots=True)
class ImageSavings:
    """The tokens of one image; names as in `PromptSavings`."""

    image_tokens: int
    kept_shallow: int
    kept_deep: int


@dataclass(frozen=True, slots=True)
class PromptSavings:
    """The cost of a prompt with and without pruning. Several prompts add up.

    Attributes:
        images: each image that has tokens, in prompt order.
        image_tokens: image tokens of the prompt.
        kept_shallow: of these, alive after the first cut.
        kept_deep: of these, alive after the second cut.
        kv_tokens: KV entries of the prompt, summed over the layers.
        kv_tokens_unpruned: the same without pruning.
        prefill_flops: FLOPs of the decoder's prefill; text tokens and attention's quadratic part
            included, vision tower excluded.
        prefill_flops_unpruned: the same without pruning.
    """

    images: tuple[ImageSavings, ...]
    image_tokens: int
    kept_shallow: int
    kept_deep: int
    kv_tokens: int
    kv_tokens_unpruned: int
    prefill_flops: int
    prefill_flops_unpruned: int

    def __add__(self, other: PromptSavings) -> PromptSavings:
        """Both together."""
        names = [field.name for field in fields(self)]
        return PromptSavings(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def as_usage(self) -> dict[str, Any]:
        """The `himap` object in the usage of an answer, without what is said of each image."""
        usage = asdict(self)
        del usage["images"]
        usage["prefill_flops_ratio"] = usage.pop("prefill_flops") / usage.pop(
            "prefill_flops_unpruned"
        )
        return usage


def prompt_savings(
    num_prompt_tokens: int,
    image_tokens: Sequence[int],
    plan: PromptPlan | None,
    stage_layers: Sequence[int],
    shape: DecoderShape,
) -> PromptSavings:
    """The numbers of one prompt with images.

    Args:
        num_prompt_tokens: text and image tokens.
        image_tokens: of each image that has any.
        plan: None: it ran unpruned.
        stage_layers: decoder layers of each stage.
        shape: of the decoder.
    """
    counts = [(count,) * NUM_STAGES for count in image_tokens] if plan is None else plan.counts
    removed = (0,) * NUM_STAGES if plan is None else plan.removed
    tokens = [num_prompt_tokens - gone for gone in removed]
    num_layers = sum(stage_layers)
    num_image_tokens = sum(image_tokens)
    return PromptSavings(
        images=tuple(ImageSavings(*tokens) for tokens in counts),
        image_tokens=num_image_tokens,
        kept_shallow=num_image_tokens - removed[1],
        kept_deep=num_image_tokens - removed[2],
        kv_tokens=sum(layers * count for layers, count in zip(stage_layers, tokens, strict=True)),
        kv_tokens_unpruned=num_layers * num_prompt_tokens,
        prefill_flops=sum(
            layers * shape.layer_flops(count)
            for layers, count in zip(stage_layers, tokens, strict=True)
        ),
        prefill_flops_unpruned=num_layers * shape.layer_flops(num_prompt_tokens),
    )
