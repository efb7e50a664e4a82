# SPDX-License-Identifier: Apache-2.0
"""What the counters are asked, once all is measured: profiler and checks disturb timings.

Each part is tried by itself. Answers are plain data, by name of the engine or system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.gpu.counters import GRAPH_LAUNCH
from bench.gpu.plan import Load, Plan, System

REQUESTS = 50  # of different ratios and lengths
DECODE_STEPS = 16

Ask = Callable[..., Any]  # engine, method, arguments


def recompilation(_: Plan, engines: Iterable[str], ask: Ask) -> dict[str, Any]:
    """By engine: compilation's counters `before`, and what `REQUESTS` different ones added."""
    found = {}
    for engine in engines:
        before = ask(engine, "rpc", "bench_compilations")
        ask(engine, "different", REQUESTS)
        after = ask(engine, "rpc", "bench_compilations")
        added = {name: n - before.get(name, 0) for name, n in after.items()}
        found[engine] = {"before": before, "added": {name: n for name, n in added.items() if n}}
    return found


def waits(plan: Plan, engines: Iterable[str], ask: Ask) -> dict[str, Any]:
    """By engine: places where steps waited for the device, prefilling and decoding."""
    found = {}
    for engine in engines:
        ask(engine, "rpc", "bench_watch_waits")
        for system in plan.of(engine):
            for batch in (1, 16):
                ask(engine, "load", _load(plan, system, batch, tokens=1 + DECODE_STEPS))
        found[engine] = ask(engine, "rpc", "bench_waits_seen")
    return found


def traces(plan: Plan, engines: Iterable[str], ask: Ask) -> dict[str, Any]:
    """By system: what the profiler saw.

    `steps` that pruned, and launches of `kernels` in them, of prompts that are pruned together;
    `decode_calls`: of CUDA's functions per decode step of one request; `full_graphs` that the
    engine has; of one lone prompt, by text tokens, `device_ms` and `prefill_graphs`, replayed.
    """
    found = {}
    for engine in engines:
        loads = [
            load
            for system in plan.of(engine)
            for load in (
                _load(plan, system, batch=16),
                _load(plan, system),
                _load(plan, system, tokens=1 + DECODE_STEPS),
                *(_load(plan, system, text=text) for text in plan.text_tokens),
            )
        ]
        seen = iter(ask(engine, "traced", loads))
        graphs = ask(engine, "rpc", "bench_full_graphs")
        for system in plan.of(engine):
            together, short, long = (next(seen) for _ in range(3))
            alone = {str(text): next(seen) for text in plan.text_tokens}
            found[system.name] = {
                "steps": together["steps"],
                "kernels": together["kernels"],
                "decode_calls": {
                    call: (count - short["calls"].get(call, 0)) / DECODE_STEPS
                    for call, count in sorted(long["calls"].items())
                },
                "full_graphs": graphs,
                "device_ms": {text: traced["device_ms"] for text, traced in alone.items()},
                "prefill_graphs": {
                    text: traced["calls"].get(GRAPH_LAUNCH, 0) for text, traced in alone.items()
                },
            }
    return found


def _load(
    plan: Plan, system: System, batch: int = 1, text: int | None = None, tokens: int = 1
) -> Load:
    return Load(batch, batch, text or plan.text_tokens[0], tokens, system.ratios)
