# SPDX-License-Identifier: Apache-2.0
"""What pruning can save at best: counting, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from himap_vllm.plan.cuts import stage_layers
from himap_vllm.plan.prompt import NUM_STAGES, Ratios, kept


@dataclass(frozen=True)
class Cuts:
    """Where the cuts lie and what they drop."""

    shallow_layer: int
    deep_layer: int
    ratios: Ratios

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """[NUM_STAGES] decoder layers of each stage."""
        return stage_layers(self.shallow_layer, self.deep_layer, num_layers)

    def stage_tokens(self, num_tokens: float, image_tokens: int) -> tuple[float, ...]:
        """[NUM_STAGES] tokens left of `num_tokens` (text and one image) in each stage."""
        shallow = kept(image_tokens, self.ratios.shallow)
        deep = kept(shallow, self.ratios.deep)
        return num_tokens, num_tokens - image_tokens + shallow, num_tokens - image_tokens + deep


@dataclass(frozen=True)
class PrefillBound:
    """Token-layers: how many times a decoder layer processes a token during prefill.

    The cost of everything in a decoder layer but attention is proportional to it. Attention falls
    faster, with the square of the tokens, and what lies outside the layers does not fall at all:
    so a measured ratio can come out on either side of `speedup`.
    """

    before: float
    after: float

    @property
    def speedup(self) -> float:
        return self.before / self.after


def prefill_bound(
    num_tokens: float, image_tokens: int, num_layers: int, cuts: Cuts
) -> PrefillBound:
    """The bound for prompts of `num_tokens` (a mean, hence no integer), one image each."""
    tokens = cuts.stage_tokens(num_tokens, image_tokens)
    after = sum(t * n for t, n in zip(tokens, cuts.stage_layers(num_layers), strict=True))
    return PrefillBound(before=num_tokens * num_layers, after=after)


def blocks_per_request(
    tokens: Sequence[int], groups: Sequence[int], block_size: int
) -> tuple[int, ...]:
    """[groups] KV blocks of one request.

    Args:
        tokens: [NUM_STAGES] tokens of the request in each stage.
        groups: [groups] stage of each KV cache group.
        block_size: tokens per block.
    """
    assert len(tokens) == NUM_STAGES
    return tuple(-(-tokens[stage] // block_size) for stage in groups)
