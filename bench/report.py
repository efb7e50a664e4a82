# SPDX-License-Identifier: Apache-2.0
"""From the samples of `bench.serve` to tables and verdicts. A load is a concurrency."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from bench.capacity import BLOCK_SIZE, KV_BYTES, OUTPUT_TOKENS, Capacity, capacity_table
from bench.model import THIN, PrefillBound
from bench.samples import PRUNED, STOCK, UNPRUNED, Samples
from bench.tables import Check, number, report, table, verdicts, versions

CELLS = (STOCK, UNPRUNED, PRUNED)
SHARE_WANTED = 0.90
SLOWDOWN_ALLOWED = 1.02

# Medians of a load, as vLLM's load generator has them, but for `PREFILL`: mean time from being
# scheduled to the first token, as the engine has it: image encoder, decoder and sampling, but no
# HTTP, image preprocessing or queueing.
TTFT, TPOT, REQUESTS, TOKENS = CLIENT = (
    "median_ttft_ms", "median_tpot_ms", "request_throughput", "output_throughput",
)  # fmt: skip
PREFILL = "prefill_ms"


@dataclass(frozen=True)
class Results:
    """Everything measured, with what is needed to read it.

    Attributes:
        description: settings and environment, JSON-ready.
        samples: of all cells, concurrencies and rounds.
        bound: of prefill, for the prompts of the lowest concurrency.
        capacity: by cell, without `UNPRUNED`.
    """

    description: dict[str, Any]
    samples: Samples
    bound: PrefillBound
    capacity: dict[str, Capacity]

    @property
    def concurrencies(self) -> list[int]:
        return sorted(self.samples.loads())

    def speedup(self, metric: str) -> float:
        """Stock over pruned at the lowest concurrency."""
        return self.samples.compare(metric, self.concurrencies[0], STOCK, PRUNED).median

    def share(self, metric: str) -> float:
        """How much of the bound the speed-up reaches."""
        return self.speedup(metric) / self.bound.speedup


def mean_prompt_tokens(samples: Samples) -> float:
    """Mean prompt length at the lowest concurrency, image tokens included, as the server says."""
    lowest = min(samples.loads())
    return float(mean(n for s in samples if s.load == lowest for n in s.raw["input_lens"]))


def checks(results: Results) -> list[Check]:
    """The claims the benchmark is there to test."""
    samples, lowest = results.samples, results.concurrencies[0]
    share = results.share(TTFT)
    claim = f"TTFT at concurrency {lowest} reaches {SHARE_WANTED:.0%} of the token-layer bound"
    found = [Check(claim, share >= SHARE_WANTED, f"{share:.1%}")]
    for name, metric in (("TTFT", TTFT), ("TPOT", TPOT)):
        slower = samples.compare(metric, lowest, UNPRUNED, STOCK)
        claim = f"unpruned {name} at concurrency {lowest} at most "
        claim += f"{SLOWDOWN_ALLOWED - 1:.0%} above stock"
        found.append(Check(claim, slower.median <= SLOWDOWN_ALLOWED, slower.show()))
    for concurrency in results.concurrencies:
        faster = samples.compare(REQUESTS, concurrency, PRUNED, UNPRUNED)
        claim = f"throughput at concurrency {concurrency}: pruned above unpruned"
        found.append(Check(claim, faster.median > 1, f"x {faster.show()}"))
    for cell, capacity in results.capacity.items():
        claim = f"KV cache of {cell}: blocks and memory per request, requests that fit as by "
        numbers = (
            f"{capacity.blocks:g} blocks, {capacity.kv_bytes / 2**20:.2f} MiB, "
            f"{capacity.peak} requests, {capacity.pool_share:.1%} of the budget in blocks, "
            f"{capacity.preemptions} preemptions"
        )
        found.append(Check(f"{claim}arithmetic", capacity.agrees, numbers))
    return found


def _speed(results: Results) -> str:
    samples, rows = results.samples, []
    for concurrency in results.concurrencies:
        for cell in CELLS:
            row = [str(concurrency), cell]
            for metric, digits in ((TTFT, 0), (TPOT, 1), (REQUESTS, 3)):
                row.append(number(samples.median(metric, concurrency, cell), digits))
                spread = samples.compare(metric, concurrency, cell, STOCK)
                row.append("1" if cell == STOCK else spread.show())
            rows.append([*row, number(samples.median(TOKENS, concurrency, cell), 2)])
    header = ["concurrency", "cell", "TTFT, ms", "x stock", "TPOT, ms", "x stock"]
    return table([*header, "requests/s", "x stock", "output tokens/s"], rows)


def _bound(results: Results) -> str:
    rows = []
    for name, metric in (("TTFT", TTFT), ("prefill inside the engine", PREFILL)):
        lowest = results.concurrencies[0]
        values = [number(results.samples.median(metric, lowest, cell)) for cell in CELLS]
        speedup, share = results.speedup(metric), results.share(metric)
        rows.append([name, *values, f"{speedup:.2f}", f"{share:.1%}"])
    bound = results.bound
    return (
        f"Token-layers per prompt: {bound.before:.0f} before, {bound.after:.0f} after; bound "
        f"{bound.speedup:.2f}.\n\n"
    ) + table(["ms", *CELLS, "stock / pruned", "share of the bound"], rows)


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
        f"{machine['cpu']}, {machine['cores']} cores; {versions(machine)}. "
        f"{model['num_layers']} layers, {model['decoder_parameters'] / 1e6:.0f} M decoder "
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
