# SPDX-License-Identifier: Apache-2.0
"""The model that is measured: dimensions, a checkpoint without weights, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.arithmetic import Cuts
from himap_vllm.plan.savings import DecoderShape
from tests.checkpoints import build_llava

PATCH_SIZE = 14  # pixels
ELEMENT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Peaks:
    """What a device can do: FLOP/s of dense bfloat16 products, bytes/s of its memory."""

    flops: float
    bandwidth: float


# NVIDIA H200 SXM data sheet: 989 TFLOP/s dense bfloat16, 4.8 TB/s.
NOMINAL = {"NVIDIA H200": Peaks(flops=989e12, bandwidth=4.8e12)}


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that must cross the memory bus at least once."""

    flops: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        """The least time it takes: arithmetic and memory traffic overlap at best."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def bound_seconds(work: Sequence[Work], peaks: Peaks) -> float:
    """The least time of pieces that run one after the other."""
    return sum(piece.seconds(peaks) for piece in work)


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower, of which the layers up to the last but one are run."""

    image_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // PATCH_SIZE) ** 2


@dataclass(frozen=True)
class Shape:
    """A LLaVA-1.5 with multi-head attention throughout."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    tower: Tower

    @property
    def image_tokens(self) -> int:
        return self.tower.image_tokens

    @property
    def decoder(self) -> DecoderShape:
        return DecoderShape(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_size=self.hidden_size // self.num_heads,
        )

    @property
    def layer_bytes(self) -> int:
        """Weights of one decoder layer."""
        matrices = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return ELEMENT_BYTES * matrices

    @property
    def kv_bytes(self) -> int:
        """Key and value of one token in one layer."""
        return ELEMENT_BYTES * 2 * self.hidden_size

    def _head(self, num_rows: int) -> Work:
        """The output projection, for the rows that are sampled from."""
        weights = self.hidden_size * self.vocab_size
        return Work(2 * num_rows * weights, ELEMENT_BYTES * weights)

    def vision(self, num_images: int) -> Work:
        """Vision tower and projector; the class token included."""
        tower, tokens = self.tower, self.image_tokens + 1
        layers = tower.num_layers - 1
        weights = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
        attention = 4 * tokens**2 * tower.hidden_size
        patches = tower.hidden_size * 3 * PATCH_SIZE**2
        projector = tower.hidden_size * self.hidden_size + self.hidden_size**2
        flops = layers * (2 * tokens * weights + attention)
        flops += 2 * self.image_tokens * (patches + projector)
        return Work(num_images * flops, ELEMENT_BYTES * (layers * weights + patches + projector))

    def prefill(self, text_tokens: int, cuts: Cuts, tower: bool = True) -> list[Work]:
        """One prompt, one image: tower, a piece of work per decoder layer, one row of logits."""
        stages = cuts.stage_tokens(self.image_tokens + text_tokens, self.image_tokens)
        pieces = [self.vision(1)] if tower else []
        for layers, tokens in zip(cuts.stage_layers(self.num_layers), stages, strict=True):
            flops = self.decoder.layer_flops(int(tokens))
            layer = Work(flops, self.layer_bytes + tokens * self.kv_bytes)
            pieces += [layer] * layers
        return [*pieces, self._head(1)]

    def decode(self, batch: int, context: float, cuts: Cuts) -> list[Work]:
        """One token for each of `batch` requests that have `context` tokens before any cut."""
        stages = cuts.stage_tokens(context, self.image_tokens)
        pieces = []
        for layers, tokens in zip(cuts.stage_layers(self.num_layers), stages, strict=True):
            flops = batch * (self.layer_bytes + 4 * tokens * self.hidden_size)
            layer = Work(flops, self.layer_bytes + batch * tokens * self.kv_bytes)
            pieces += [layer] * layers
        return [*pieces, self._head(batch)]

    def checkpoint(self, folder: Path) -> Path:
        """Configuration, tokenizer and processor, for `--load-format dummy`."""
        return build_llava(
            folder / self.name,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            image_size=self.tower.image_size,
            patch_size=PATCH_SIZE,
            vision_layers=self.tower.num_layers,
            vision_hidden_size=self.tower.hidden_size,
            vision_heads=self.tower.num_heads,
            vision_intermediate_size=self.tower.intermediate_size,
            vocab_size=self.vocab_size,
            weights=False,
        )


# llava-hf/llava-1.5-7b-hf: Vicuna 7B, CLIP ViT-L/14-336.
LLAVA_7B = Shape(
    name="llava-1.5-7b",
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    vocab_size=32064,
    tower=Tower(336, 1024, 4096, 24, 16),
)
# The same keys and values per token, hardly any other weights: blocks follow from those alone.
LLAVA_7B_KV = Shape(
    name="llava-1.5-7b-kv",
    hidden_size=4096,
    intermediate_size=64,
    num_layers=32,
    num_heads=32,
    vocab_size=512,
    tower=Tower(336, 32, 64, 3, 2),
)
# To try the script on a CPU.
TINY = Shape(
    name="tiny",
    hidden_size=128,
    intermediate_size=256,
    num_layers=12,
    num_heads=2,
    vocab_size=512,
    tower=Tower(112, 32, 64, 3, 2),
)
