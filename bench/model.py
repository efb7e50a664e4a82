# SPDX-License-Identifier: Apache-2.0
"""The models that are measured (LLaVA-1.5 in shape), and what pruning can save of them at best.

Everything here is counted, not measured: tokens, KV blocks, FLOPs and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from himap_vllm.plan.cuts import stage_layers
from himap_vllm.plan.prompt import Ratios, kept
from himap_vllm.plan.savings import DecoderShape
from tests.checkpoints import build_llava

PATCH_SIZE = 14  # pixels
IMAGE_SIZE = 336  # pixels, as LLaVA-1.5 has it
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ELEMENT_BYTES = DTYPE_BYTES["bfloat16"]  # of `Work`


@dataclass(frozen=True)
class Cuts:
    """Where the cuts lie and what they drop."""

    shallow_layer: int
    deep_layer: int
    ratios: Ratios

    def engine_settings(self) -> dict[str, Any]:
        """Of an engine that prunes only what asks for it, by the paper's criterion."""
        layers = {"shallow_layer": self.shallow_layer, "deep_layer": self.deep_layer}
        return {**layers, "shallow_ratio": 0, "deep_ratio": 0, "criterion": "himap"}

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


@dataclass(frozen=True)
class Peaks:
    """What a device can do: FLOP/s of dense bfloat16 products, bytes/s of its memory."""

    flops: float
    bandwidth: float


# NVIDIA's data sheets of the SXM cards, dense bfloat16.
NOMINAL = {
    "NVIDIA H100 80GB HBM3": Peaks(flops=989e12, bandwidth=3.35e12),
    "NVIDIA H200": Peaks(flops=989e12, bandwidth=4.8e12),
}


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


SMALL_TOWER = Tower(IMAGE_SIZE, 32, 64, 3, 2)


@dataclass(frozen=True)
class Model:
    """A LLaVA-1.5 with multi-head attention throughout.

    Speed and KV blocks do not depend on what the weights are, only on how many there are.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    tower: Tower = SMALL_TOWER  # small, so that the decoder dominates
    vocab_size: int | None = None  # None: the tokenizer's own

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
    def layer_parameters(self) -> int:
        """Weights of the matrices of one decoder layer."""
        return 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_bytes(self) -> int:
        """Bytes of these weights in bfloat16."""
        return ELEMENT_BYTES * self.layer_parameters

    def kv_bytes(self, dtype: str = "bfloat16") -> int:
        """Key and value of one token in one layer."""
        return 2 * self.hidden_size * DTYPE_BYTES[dtype]

    def _head(self, num_rows: int) -> Work:
        """The output projection, for the rows that are sampled from."""
        weights = self.hidden_size * (self.vocab_size or 0)
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
            layer = Work(flops, self.layer_bytes + tokens * self.kv_bytes())
            pieces += [layer] * layers
        return [*pieces, self._head(1)]

    def decode(self, batch: int, context: float, cuts: Cuts) -> list[Work]:
        """One token for each of `batch` requests that have `context` tokens before any cut."""
        stages = cuts.stage_tokens(context, self.image_tokens)
        pieces = []
        for layers, tokens in zip(cuts.stage_layers(self.num_layers), stages, strict=True):
            flops = batch * (self.layer_bytes + 4 * tokens * self.hidden_size)
            layer = Work(flops, self.layer_bytes + batch * tokens * self.kv_bytes())
            pieces += [layer] * layers
        return [*pieces, self._head(batch)]

    def checkpoint(self, folder: Path, weights: bool = True) -> Path:
        """The model's directory under `folder`; written if it is not there.

        Without weights it is for `--load-format dummy`.
        """
        name = f"llava-{self.num_layers}x{self.hidden_size}-{self.intermediate_size}"
        path = folder / (name if weights else f"{name}-dummy")
        done = path / ".complete"
        if not done.exists():
            build_llava(
                path,
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
                weights=weights,
            )
            done.touch()
        return path

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        decoder_parameters = self.num_layers * self.layer_parameters
        counted = {"image_tokens": self.image_tokens, "decoder_parameters": decoder_parameters}
        return {**asdict(self), **counted}


FULL = Model(32, 14, 896, 2432)  # 312 M parameters
# Block counts follow from the numbers of layers and tokens; the width only costs time.
THIN = Model(32, 1, 64, 64)
QUICK = Model(12, 2, 128, 256)
# llava-hf/llava-1.5-7b-hf: Vicuna 7B, CLIP ViT-L/14-336.
LLAVA_7B = Model(32, 32, 4096, 11008, Tower(336, 1024, 4096, 24, 16), 32064)
# The same keys and values per token, hardly any other weights: blocks follow from those alone.
LLAVA_7B_KV = Model(32, 32, 4096, 64, SMALL_TOWER, 512)
# To try `bench.gpu` on a CPU.
TINY = Model(12, 2, 128, 256, Tower(112, 32, 64, 3, 2), 512)
