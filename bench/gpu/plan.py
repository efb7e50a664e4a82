# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, and what is left out when time runs short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.gpu.engine import MAX_SEQS, Load
from bench.model import LLAVA_7B, LLAVA_7B_KV, TINY, Cuts, Model
from bench.report import STOCK, UNPRUNED
from himap_vllm.plan.prompt import Ratios

TTFT, PREFILL, DECODE, LOAD = "ttft", "prefill", "decode", "load"


@dataclass(frozen=True)
class System:
    """What serves a load: an engine, and what each request asks of it."""

    name: str
    plugin: bool
    ratios: tuple[float, float] | None = None

    def cuts(self, plan: Plan) -> Cuts:
        """What happens to a prompt here."""
        return Cuts(plan.shallow_layer, plan.deep_layer, Ratios(*(self.ratios or (0.0, 0.0))))


def pruned(ratios: tuple[float, float]) -> System:
    """The plugin with requests that ask for `ratios`."""
    return System(f"himap, {ratios[0]:g} / {ratios[1]:g}", True, ratios)


@dataclass(frozen=True)
class Cell:
    """One load on one system."""

    part: str
    system: System
    load: Load
    round_index: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Cells of the same key are repetitions."""
        return self.part, self.system.name, self.load.text_tokens, self.load.concurrency


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        kv_shape: for the KV cache part.
        kv_bytes: KV cache of each engine.
        capacity_kv_bytes: the budget that is filled in the KV cache part.
        tokens: output tokens of the decode and of the load part.
        scoring_prompts: pruned prompts in a step, for the scoring part.
        budget_seconds: for everything.
        reserve_seconds: of these, for what follows the rounds: counters, KV capacity.
    """

    shape: Model
    kv_shape: Model
    device: str
    kv_bytes: int
    capacity_kv_bytes: int
    num_images: int
    text_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    concurrencies: tuple[int, ...]
    tokens: tuple[int, int]
    ttft_requests: int
    scoring_prompts: tuple[int, ...]
    budget_seconds: float
    reserve_seconds: float
    ratios: tuple[tuple[float, float], ...] = ((0.5, 0.75), (0.75, 0.75))
    shallow_layer: int = 2
    deep_layer: int = 8
    rounds: int = 5

    @property
    def systems(self) -> list[System]:
        """Stock first."""
        return [
            System(STOCK, False),
            System(UNPRUNED, True),
            *(pruned(ratios) for ratios in self.ratios),
        ]

    @property
    def max_seqs(self) -> int:
        """Requests that an engine runs at once."""
        return MAX_SEQS if self.device == "cuda" else 8

    def warm_up(self, plugin: bool) -> tuple[Load, ...]:
        """Loads that show an engine every kind of step at its largest."""
        count = self.max_seqs
        return tuple(
            Load(count, count, text, 4, system.ratios)
            for text in self.text_tokens
            for system in self.systems
            if system.plugin == plugin
        )

    def room(self, text_tokens: int) -> int:
        """Unpruned requests whose prompt and answer the KV cache of an engine holds."""
        block, dtype = (16, "bfloat16") if self.device == "cuda" else (128, "float32")
        tokens = self.shape.image_tokens + text_tokens + self.tokens[1] - 1
        of_token = self.shape.num_layers * self.shape.kv_bytes(dtype)
        return (self.kv_bytes // (of_token * block) - 1) // -(-tokens // block)

    def loads(self) -> Iterator[tuple[str, Load]]:
        """Of one round, what matters most first."""
        for text in self.text_tokens:
            yield TTFT, Load(1, self.ttft_requests, text, 1)
            yield PREFILL, Load(1, self.ttft_requests, text, 1, same_image=True)
        for text in self.text_tokens:
            for batch in self.batches:
                yield DECODE, Load(batch, batch, text, self.tokens[0])
        for text in self.text_tokens:
            for concurrency in self.concurrencies:
                requests = max(8, 3 * concurrency)
                yield LOAD, Load(concurrency, requests, text, self.tokens[1])

    def groups(self, round_index: int) -> Iterator[list[Cell]]:
        """Cells to be compared with each other; systems take turns at being first."""
        systems = self.systems
        turn = round_index % len(systems)
        for part, load in self.loads():
            yield [
                Cell(part, system, Load(**{**vars(load), "ratios": system.ratios}), round_index)
                for system in systems[turn:] + systems[:turn]
            ]


def full(budget_seconds: float) -> Plan:
    """On an H200: two engines side by side, 2 x (13.5 + 49.25) GiB and what they work with.

    The largest load has room: 128 requests of 777 tokens, 8 MiB for a block of 16.
    """
    return Plan(
        shape=LLAVA_7B,
        kv_shape=LLAVA_7B_KV,
        device="cuda",
        kv_bytes=197 << 28,
        capacity_kv_bytes=4 << 30,
        num_images=256,
        text_tokens=(35, 170),
        batches=(1, 16, 64),
        concurrencies=(1, 2, 4, 8, 16, 32, 64, 128),
        tokens=(64, 32),
        ttft_requests=24,
        scoring_prompts=(1, 8, 32),
        budget_seconds=budget_seconds,
        reserve_seconds=120.0,
    )


def tiny(device: str, budget_seconds: float) -> Plan:
    """Every cell, on anything, within minutes; its timings mean nothing."""
    return Plan(
        shape=TINY,
        kv_shape=TINY,
        device=device,
        kv_bytes=256 << 20,
        capacity_kv_bytes=32 << 20,
        num_images=8,
        text_tokens=(35, 170),
        batches=(1, 4),
        concurrencies=(1, 4),
        tokens=(24, 4),
        ttft_requests=2,
        scoring_prompts=(1, 2),
        budget_seconds=budget_seconds,
        reserve_seconds=45.0 if device == "cuda" else 0.0,
        rounds=2,
    )


def seconds_needed(group: Sequence[Cell], taken: dict[tuple[str, str, int, int], float]) -> float:
    """A guess at what a group takes, from what its cells, or the latest ones, took."""
    latest = max(list(taken.values())[-len(group) :], default=0.0)
    return sum(taken.get(cell.key, latest) for cell in group)
