# SPDX-License-Identifier: Apache-2.0
"""The claims that `bench.gpu` is there to test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.gpu.counters import GRAPH_LAUNCH, KERNELS
from bench.gpu.counting import REQUESTS
from bench.gpu.plan import DECODE, LOAD, PLUGIN, PREFILL, TTFT, WITHOUT
from bench.gpu.results import Results
from bench.samples import STOCK, UNPRUNED
from bench.tables import Check

SHARE_WANTED = 0.90
ALLOWED = 1.01  # x stock, where nothing is pruned
CAPACITY_ALLOWED = 0.02

Finding = tuple[bool | None, str] | None


def checks(results: Results) -> list[Check]:
    """All claims; of timings, those that could be tested."""
    return [
        *_speedups(results),
        *_near_stock(results),
        *_throughput(results),
        *_capacity(results),
        *_counted(results),
    ]


def _speedups(results: Results) -> Iterator[Check]:
    plan, samples = results.plan, results.samples
    for text in plan.text_tokens:
        for part, what in ((TTFT, "prefill"), (PREFILL, "the decoder's prefill")):
            before = samples.median("prefill_ms", (part, text, 1), STOCK)
            for system in plan.systems[2:]:
                after = samples.median("prefill_ms", (part, text, 1), system.name)
                of_flops, of_both = results.saved(system, text, tower=part == TTFT)
                if not before or not after or not of_both:
                    continue
                claim = (
                    f"{text} text tokens, {system.name}: the speed-up of {what} reaches "
                    f"{SHARE_WANTED:.0%} of that of the"
                )
                share, ceiling = before / after / of_flops, of_both / of_flops
                passed = None if max(share, ceiling) < SHARE_WANTED else share >= SHARE_WANTED
                why = f"not reachable on this device (at most {ceiling:.0%})"
                yield Check(f"{claim} FLOP bound", passed, f"{share:.3f}", why)
                share /= ceiling
                passed = share >= SHARE_WANTED
                yield Check(f"{claim} FLOP and bandwidth bound", passed, f"{share:.3f}")


def _near_stock(results: Results) -> Iterator[Check]:
    plan = results.plan
    for text in plan.text_tokens:
        for metric, what in (("prefill_ms", "prefill"), ("ttft_ms", "time to first token")):
            claim = f"{text} text tokens: unpruned {what} within 1 % of stock or better"
            yield from _within(results, claim, metric, (TTFT, text, 1), UNPRUNED)
        for batch in plan.batches:
            for system in plan.systems[1:]:
                claim = f"{text} text tokens, batch {batch}, {system.name}: decode within 1 % of "
                load = (DECODE, text, batch)
                yield from _within(results, f"{claim}stock or better", "step_ms", load, system.name)


def _within(
    results: Results, claim: str, metric: str, load: tuple[str, int, int], system: str
) -> Iterator[Check]:
    stock = results.samples.rounds(metric, load, STOCK)
    own = results.samples.rounds(metric, load, system)
    rounds = [own[index] / stock[index] for index in own.keys() & stock.keys()]
    if not rounds:
        return
    ratio = median(own.values()) / median(stock.values())
    spread = (max(stock.values()) - min(stock.values())) / median(stock.values())
    more = f"by round {min(rounds):.3f} to {max(rounds):.3f}; stock's differ by {spread:.1%}"
    found = f"{ratio:.3f} ({more if len(rounds) > 1 else 'one round'})"
    yield Check(claim, ratio <= ALLOWED, found)


def _throughput(results: Results) -> Iterator[Check]:
    plan, rate = results.plan, "requests_per_second"
    for text in plan.text_tokens:
        for concurrency in plan.concurrencies:
            load = (LOAD, text, concurrency)
            base = results.samples.median(rate, load, STOCK)
            for system in plan.systems[2:]:
                own = results.samples.median(rate, load, system.name)
                if base and own:
                    claim = f"{text} text tokens, concurrency {concurrency}, {system.name}: "
                    yield Check(f"{claim}throughput above stock", own > base, f"{own / base:.3f}")


def _capacity(results: Results) -> Iterator[Check]:
    for name, capacity in sorted(results.capacity.items()):
        ratio = capacity.peak / capacity.peak_expected
        yield Check(
            f"KV capacity of {name}: requests that fit within {CAPACITY_ALLOWED:.0%} of the "
            "arithmetic, and memory as it says",
            abs(ratio - 1) <= CAPACITY_ALLOWED and capacity.memory_agrees,
            f"{ratio:.3f}, {capacity.pool_share:.1%} of the budget in blocks, "
            f"{capacity.kv_bytes / 2**20:.1f} of {capacity.kv_bytes_expected / 2**20:.1f} MiB",
        )


def _counted(results: Results) -> Iterator[Check]:
    counted = results.counted
    for claim, part, judge in (
        ("one scoring launch and one gather per cut of a step that prunes", "traces", _launches),
        ("decode steps replay as many graphs as stock", "traces", _replays),
        ("the host waits for the device nowhere but where stock does", "waits", _waits),
        (f"no compilation in {REQUESTS} different ratios and lengths", "recompilation", _compiled),
    ):
        found = judge(counted[part]) if part in counted else None
        passed, text = found or (None, "not on this device, or it failed (below)")
        yield Check(claim, passed, text)


def _launches(found: dict[str, Any]) -> Finding:
    pruned = {name: row for name, row in found.items() if name not in (STOCK, UNPRUNED)}
    if not pruned:
        return None
    passed, texts = True, []
    for name, row in pruned.items():
        counts = [row["kernels"].get(kernel, 0) for kernel in KERNELS]
        passed &= row["steps"] > 0 and all(count == 2 * row["steps"] for count in counts)
        texts.append(f"{name}: {' and '.join(map(str, counts))} in {row['steps']} steps")
    return passed, "; ".join(texts)


def _replays(found: dict[str, Any]) -> Finding:
    if STOCK not in found or len(found) < 2:
        return None
    replays = {name: row["decode_calls"].get(GRAPH_LAUNCH, 0.0) for name, row in found.items()}
    graphs = {name: row["full_graphs"] for name, row in found.items()}
    alike = len(set(replays.values())) == 1 and len(set(graphs.values())) == 1
    text = "; ".join(f"{name}: {n:g} per step" for name, n in replays.items())
    captured = ", ".join(map(str, graphs.values()))
    passed = alike and replays[STOCK] > 0 and graphs[STOCK] > 0
    return passed, f"{text}; full graphs captured: {captured}"


def _waits(found: dict[str, Any]) -> Finding:
    if len(found) < 2:
        return None
    more = sorted(found[PLUGIN].keys() - found[WITHOUT].keys())
    return not more, _listed(more) if more else f"{len(found[WITHOUT])} places in both"


def _compiled(found: dict[str, Any]) -> Finding:
    if PLUGIN not in found:
        return None
    before, added = found[PLUGIN]["before"], found[PLUGIN]["added"]
    if not before["vllm num_models_seen"]:
        return None, "this engine compiles nothing"  # so nothing could fail
    in_stock = found.get(WITHOUT, {}).get("added", {})
    more = sorted(name for name, count in added.items() if count > in_stock.get(name, 0))
    if more:
        return False, _listed(more)
    return True, f"as in stock: {_listed(sorted(added))}" if added else "no counter moved"


def _listed(names: Sequence[str], most: int = 8) -> str:
    left = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + left
