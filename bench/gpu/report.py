# SPDX-License-Identifier: Apache-2.0
"""From raw measurements of `bench.gpu` to tables; README.md says how to read them."""

from __future__ import annotations

from bench.capacity import capacity_table
from bench.gpu.checks import checks
from bench.gpu.plan import DECODE, LOAD, PREFILL, TTFT
from bench.gpu.results import Results
from bench.model import TINY, Peaks
from bench.samples import STOCK
from bench.tables import number, ratio, report, table, verdicts, versions

UNCOUNTED = "Not measured on this device, or it failed."


def _ttft(results: Results, part: str) -> str:
    plan, median, rows = results.plan, results.samples.median, []
    for text in plan.text_tokens:
        for system in plan.systems:
            load = (part, text, 1)
            client, engine = (median(m, load, system.name) for m in ("ttft_ms", "prefill_ms"))
            work = results.prefill(system, text, tower=part == TTFT)
            flops = sum(piece.flops for piece in work)
            arithmetic = 1000 * flops / results.peaks.flops if results.peaks else None
            bound = results.bound_ms(work)
            rows.append(
                [
                    text, system.name,
                    number(client, 2), ratio(client, median("ttft_ms", load, STOCK)),
                    number(engine, 2), ratio(engine, median("prefill_ms", load, STOCK)),
                    number(flops / 1e12, 2),
                    number(arithmetic, 2), ratio(arithmetic, engine, ".1%"),
                    number(bound, 2), ratio(bound, engine, ".1%"),
                ]
            )  # fmt: skip
    header = [
        "text tokens", "system", "TTFT, ms", "x stock", "in the engine, ms", "x stock", "TFLOP",
        "FLOP bound, ms", "share", "FLOP and bandwidth bound, ms", "share",
    ]  # fmt: skip
    return table(header, rows)


def _decode(results: Results) -> str:
    plan, median, rows = results.plan, results.samples.median, []
    for text in plan.text_tokens:
        for batch in plan.batches:
            for system in plan.systems:
                value, base = (
                    median("step_ms", (DECODE, text, batch), name) for name in (system.name, STOCK)
                )
                context = plan.shape.image_tokens + text + plan.tokens[0] / 2
                work = plan.shape.decode(batch, context, system.cuts(plan))
                bound = results.bound_ms(work)
                rows.append(
                    [
                        text, batch, system.name, number(value, 3), ratio(value, base),
                        number(sum(piece.bytes for piece in work) / 1e9, 1),
                        number(bound, 3), ratio(bound, value, ".1%"),
                    ]
                )  # fmt: skip
    header = ["text tokens", "batch", "system", "TPOT, ms", "x stock", "GB per step", "bound, ms"]
    return table([*header, "share"], rows)


LOAD_COLUMNS = (
    ("TTFT, ms", "ttft_ms", 1),
    ("p99", "ttft_p99_ms", 1),
    ("TPOT, ms", "tpot_ms", 2),
    ("p99", "tpot_p99_ms", 2),
    ("latency p99, ms", "latency_p99_ms", 0),
)


def _load(results: Results) -> str:
    plan, samples, rows = results.plan, results.samples, []
    for text in plan.text_tokens:
        for concurrency in plan.concurrencies:
            for system in plan.systems:
                load = (LOAD, text, concurrency)
                runs = samples.rounds("requests_per_second", load, system.name)
                rate, base = (
                    samples.median("requests_per_second", load, name)
                    for name in (system.name, STOCK)
                )
                found = (
                    number(samples.median(metric, load, system.name), digits)
                    for _, metric, digits in LOAD_COLUMNS
                )
                tokens = number(rate and rate * plan.tokens[1])
                row = [text, concurrency, system.name, number(rate, 2), ratio(rate, base), tokens]
                rows.append([*row, *found, len(runs)])
    header = ["text tokens", "concurrency", "system", "requests/s", "x stock", "output tokens/s"]
    return table([*header, *(column[0] for column in LOAD_COLUMNS), "runs"], rows)


def _room(results: Results) -> str:
    plan = results.plan
    rooms = {text: plan.room(text) for text in plan.text_tokens}
    named = " and ".join(f"{room} of {text} text tokens" for text, room in rooms.items())
    effect = "enough for every load."
    if min(rooms.values()) < plan.concurrencies[-1]:
        effect = (
            "at a concurrency above that, stock waits for room, and its throughput shows what "
            "smaller KV caches are worth besides."
        )
    return f"An engine's KV cache holds unpruned requests: {named}; {effect}\n\n"


def _scoring(results: Results) -> str:
    load, rows = (TTFT, results.plan.text_tokens[0], 1), []
    for row in results.scoring:
        prefill = results.samples.median("prefill_ms", load, row["system"])
        rows.append(
            [
                row["system"], row["prompts"], number(row["device_ms"], 3),
                number(row["launch_ms"], 3),
                ratio(row["device_ms"], prefill if row["prompts"] == 1 else None, ".1%"),
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


def _busy(results: Results) -> str:
    rows = []
    for system, found in results.counted.get("traces", {}).items():
        for text, device in found["device_ms"].items():
            took = results.samples.median("prefill_ms", (TTFT, int(text), 1), system)
            row = [system, text, number(device, 2), number(took, 2), ratio(device, took, ".1%")]
            rows.append([*row, found["prefill_graphs"][text]])
    header = ["system", "text tokens", "on the device, ms", "in the engine, ms", "busy", "graphs"]
    return table(header, rows) if rows else UNCOUNTED


def _calls(results: Results) -> str:
    calls = {name: row["decode_calls"] for name, row in results.counted.get("traces", {}).items()}
    names = sorted({name for row in calls.values() for name, count in row.items() if count})
    rows = [[of, *(number(row.get(name, 0), 2) for name in names)] for of, row in calls.items()]
    return table(["system", *names], rows) if rows else UNCOUNTED


def _peaks(results: Results) -> str:
    if not results.peaks:
        return "Peaks: not measured. "
    text = (
        "Measured peaks, which the bounds use: "
        if results.peaks_measured
        else (
            "**The device's peaks could not be measured.** The bounds use those of an H200's data "
            "sheet, which no device reaches: "
        )
    )
    text += _numbers(results.peaks)
    if results.nominal and results.peaks_measured:
        text += f"; by the data sheet: {_numbers(results.nominal)}"
    return f"{text}. "


def _numbers(peaks: Peaks) -> str:
    return f"{peaks.flops / 1e12:.0f} TFLOP/s, {peaks.bandwidth / 1e12:.2f} TB/s"


def _setting(results: Results) -> str:
    plan, shape = results.plan, results.plan.shape
    tiny = shape == TINY
    warning = "**A tiny model, to try the script: the timings mean nothing.** "
    started = (f"{name} {seconds:.0f}" for name, seconds in results.start_seconds.items())
    return (
        (warning if tiny else "") + f"{results.device}; {versions(results.environment)}. "
        f"{'tiny' if tiny else 'llava-1.5-7b'}: {shape.num_layers} layers, hidden size "
        f"{shape.hidden_size}, random weights; {shape.image_tokens} image tokens. Cuts before "
        f"layers {plan.shallow_layer} and {plan.deep_layer}. {_peaks(results)}"
        f"KV cache {plan.kv_bytes / 2**30:.2f} GiB per engine. Engines side by "
        f"side, loads one at a time; medians of repetitions. Start, in s: {', '.join(started)}. "
        f"Took {results.seconds:.0f} s of {plan.budget_seconds:.0f}."
    )


def markdown(results: Results) -> str:
    """The report."""
    return report({
        "Setting": _setting(results),
        "Time to first token, one request": _ttft(results, TTFT),
        "The same without the vision tower": _ttft(results, PREFILL),
        "Time per output token": _decode(results),
        "Under load": _room(results) + _load(results),
        "KV capacity": capacity_table("system", sorted(results.capacity.items()), 1),
        "Scoring": _scoring(results),
        "The idle device": _busy(results),
        "CUDA calls per decode step": _calls(results),
        "Checks": verdicts(checks(results)) or "None could be made.",
        "Failures": "\n".join(f"- {text}" for text in results.failures) or "None.",
        "Left out": "\n".join(f"- {text}" for text in results.dropped) or "Nothing.",
    }) + "\n"  # fmt: skip
