# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, and how large it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.model import LLAVA_7B, LLAVA_7B_KV, TINY, Cuts, Model
from bench.samples import STOCK, UNPRUNED
from himap_vllm.plan.prompt import Ratios

TTFT, PREFILL, DECODE, LOAD = "ttft", "prefill", "decode", "load"
WITHOUT, PLUGIN = ENGINES = ("stock", "himap")
MAX_SEQS = 128


@dataclass(frozen=True)
class Load:
    """So many requests, so many of them at a time, all alike but for their image.

    Attributes:
        ratios: (R1, R2) asked for by each request; None: nothing is asked for.
        text_tokens: of the prompt, beside the image's.
        same_image: what the tower made of it is found in the encoder's cache: what is left is the
            decoder's part.
    """

    concurrency: int
    num_requests: int
    text_tokens: int
    output_tokens: int
    ratios: tuple[float, float] | None = None
    same_image: bool = False


@dataclass(frozen=True)
class System:
    """What serves a load: one of `ENGINES`, and the ratios that each request asks for."""

    name: str
    engine: str
    ratios: tuple[float, float] | None = None

    def cuts(self, plan: Plan) -> Cuts:
        """What happens to a prompt here."""
        return Cuts(plan.shallow_layer, plan.deep_layer, Ratios(*(self.ratios or (0.0, 0.0))))


@dataclass(frozen=True)
class Plan:
    """All of it: by default, of an H200 with two engines, 2 x (13.5 + 49.25) GiB and some more.

    Attributes:
        kv_shape: for the KV cache part.
        kv_bytes: KV cache of each engine; see `kv_bytes_for`. The default has room for the largest
            load: 128 requests of 777 tokens, 8 MiB for a block of 16.
        capacity_kv_bytes: the budget that is filled in the KV cache part.
        tokens: output tokens of the decode and of the load part.
        scoring_prompts: pruned prompts in a step, for the scoring part.
        budget_seconds: for everything.
        reserve_seconds: of these, for what follows the rounds: counters, KV capacity.
    """

    budget_seconds: float
    device: str = "cuda"
    shape: Model = LLAVA_7B
    kv_shape: Model = LLAVA_7B_KV
    kv_bytes: int = 197 << 28
    capacity_kv_bytes: int = 4 << 30
    num_images: int = 256
    text_tokens: tuple[int, ...] = (35, 170)
    batches: tuple[int, ...] = (1, 16, 64)
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    tokens: tuple[int, int] = (64, 32)
    ttft_requests: int = 24
    scoring_prompts: tuple[int, ...] = (1, 8, 32)
    reserve_seconds: float = 120.0
    ratios: tuple[tuple[float, float], ...] = ((0.5, 0.75), (0.75, 0.75))
    shallow_layer: int = 2
    deep_layer: int = 8
    rounds: int = 5

    @property
    def systems(self) -> list[System]:
        """Stock first, then the plugin: without pruning, and pruning."""
        pruned = [System(f"himap, {r[0]:g} / {r[1]:g}", PLUGIN, r) for r in self.ratios]
        return [System(STOCK, WITHOUT), System(UNPRUNED, PLUGIN), *pruned]

    def of(self, engine: str) -> list[System]:
        """The systems on an engine."""
        return [system for system in self.systems if system.engine == engine]

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def max_seqs(self) -> int:
        """Requests that an engine runs at once."""
        return MAX_SEQS if self.device == "cuda" else 8

    def warm_up(self, engine: str) -> tuple[Load, ...]:
        """Loads that show an engine every kind of step at its largest."""
        count = self.max_seqs
        return tuple(
            Load(count, count, text, 4, system.ratios)
            for text in self.text_tokens
            for system in self.of(engine)
        )

    def room(self, text_tokens: int) -> int:
        """Unpruned requests whose prompt and answer the KV cache of an engine holds."""
        block = 16 if self.device == "cuda" else 128
        tokens = self.shape.image_tokens + text_tokens + self.tokens[1] - 1
        of_token = self.shape.num_layers * self.shape.kv_bytes(self.dtype)
        return (self.kv_bytes // (of_token * block) - 1) // -(-tokens // block)

    def loads(self) -> Iterator[tuple[str, Load]]:
        """Of one round and every system, what matters most first."""
        for text in self.text_tokens:
            yield TTFT, Load(1, self.ttft_requests, text, 1)
            yield PREFILL, Load(1, self.ttft_requests, text, 1, same_image=True)
        for text in self.text_tokens:
            for batch in self.batches:
                yield DECODE, Load(batch, batch, text, self.tokens[0])
        for text in self.text_tokens:
            for concurrency in self.concurrencies:
                yield LOAD, Load(concurrency, max(8, 3 * concurrency), text, self.tokens[1])


def kv_bytes_for(device_bytes: int) -> int:
    """The default, or what a smaller card leaves each of two engines beside their weights."""
    weights = 17 << 30  # and activations and graphs
    return min(Plan.kv_bytes, (device_bytes - (4 << 30)) // 2 - weights)


def tiny(device: str, budget_seconds: float) -> Plan:
    """Every cell, on anything, within minutes; its timings mean nothing."""
    return Plan(
        budget_seconds=budget_seconds,
        device=device,
        shape=TINY,
        kv_shape=TINY,
        kv_bytes=256 << 20,
        capacity_kv_bytes=32 << 20,
        num_images=8,
        batches=(1, 4),
        concurrencies=(1, 4),
        tokens=(24, 4),
        ttft_requests=2,
        scoring_prompts=(1, 2),
        reserve_seconds=45.0 if device == "cuda" else 0.0,
        rounds=2,
    )
