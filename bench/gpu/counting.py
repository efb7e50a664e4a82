# SPDX-License-Identifier: Apache-2.0
"""What the counters are asked, once all is measured: profiler and checks disturb timings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.gpu.counters import GRAPH_LAUNCH
from bench.gpu.engine import Load
from bench.gpu.plan import Plan, System
from bench.worker import Worker

REQUESTS = 50  # of different ratios and lengths
DECODE_STEPS = 16
CALL_SECONDS = 60.0

Part = Callable[[], Any]


class Counting:
    """Each part is tried by itself. Answers are plain data, by name of the system or engine."""

    def __init__(
        self, plan: Plan, engines: Mapping[bool, Worker], left: Callable[[], float]
    ) -> None:
        """Of engines that are warm; the key says whether it has the plugin.

        `left` tells the seconds that are left for this.
        """
        self._plan = plan
        self._engines = engines
        self._left = left

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Those that this device allows. What may break an engine comes last."""
        yield "recompilation", self.recompilation
        if self._plan.device == "cuda":
            yield "waits", self.waits  # nothing undoes it, but it adds no call to the device
            yield "traces", self.traces

    def recompilation(self) -> dict[str, Any]:
        """By engine: compilation's counters `before`, and what `REQUESTS` different ones added."""
        found = {}
        for plugin in self._engines:
            before = self._ask(plugin, "rpc", "bench_compilations")
            self._ask(plugin, "different", REQUESTS)
            after = self._ask(plugin, "rpc", "bench_compilations")
            added = {name: n - before.get(name, 0) for name, n in after.items()}
            found["himap" if plugin else "stock"] = {
                "before": before,
                "added": {name: n for name, n in added.items() if n},
            }
        return found

    def waits(self) -> dict[str, Any]:
        """By engine: places where steps waited for the device, prefilling and decoding."""
        found = {}
        for plugin in self._engines:
            self._ask(plugin, "rpc", "bench_watch_waits")
            for system in self._systems(plugin):
                for batch in (1, 16):
                    load = self._load(system, batch, tokens=1 + DECODE_STEPS)
                    self._ask(plugin, "load", load)
            found["himap" if plugin else "stock"] = self._ask(plugin, "rpc", "bench_waits_seen")
        return found

    def traces(self) -> dict[str, Any]:
        """By system: what the profiler saw.

        `steps` that pruned, and launches of `kernels` in them, of prompts that are pruned together;
        `decode_calls`: of CUDA's functions per decode step of one request; `full_graphs` that the
        engine has; of one lone prompt, by text tokens, `device_ms` and `prefill_graphs`, replayed.
        """
        found = {}
        for plugin in self._engines:
            loads = {system.name: self._traced_loads(system) for system in self._systems(plugin)}
            every = [load for of_system in loads.values() for load in of_system]
            seen = iter(self._ask(plugin, "traced", every))
            graphs = self._ask(plugin, "rpc", "bench_full_graphs")
            for name, of_system in loads.items():
                together, short, long, *alone = (next(seen) for _ in of_system)
                prefills = dict(zip(map(str, self._plan.text_tokens), alone, strict=True))
                found[name] = {
                    "steps": together["steps"],
                    "kernels": together["kernels"],
                    "decode_calls": {
                        call: (count - short["calls"].get(call, 0)) / DECODE_STEPS
                        for call, count in sorted(long["calls"].items())
                    },
                    "full_graphs": graphs,
                    "device_ms": {text: traced["device_ms"] for text, traced in prefills.items()},
                    "prefill_graphs": {
                        text: traced["calls"].get(GRAPH_LAUNCH, 0)
                        for text, traced in prefills.items()
                    },
                }
        return found

    def _traced_loads(self, system: System) -> list[Load]:
        return [
            self._load(system, batch=16),
            self._load(system),
            self._load(system, tokens=1 + DECODE_STEPS),
            *(self._load(system, text=text) for text in self._plan.text_tokens),
        ]

    def _systems(self, plugin: bool) -> list[System]:
        return [system for system in self._plan.systems if system.plugin == plugin]

    def _load(
        self, system: System, batch: int = 1, text: int | None = None, tokens: int = 1
    ) -> Load:
        text = text or self._plan.text_tokens[0]
        return Load(batch, batch, text, tokens, system.ratios)

    def _ask(self, plugin: bool, method: str, *arguments: Any) -> Any:
        seconds = min(CALL_SECONDS, max(1.0, self._left()))
        return self._engines[plugin].call(seconds, method, *arguments)
