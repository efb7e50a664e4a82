# SPDX-License-Identifier: Apache-2.0
"""What the counters are asked, once all is measured: profiler and checks disturb timings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.gpu.engine import Load
from bench.gpu.plan import Plan, System
from bench.gpu.worker import Worker

REQUESTS = 50  # of different ratios and lengths
DECODE_STEPS = 32
CALL_SECONDS = 60.0

Part = Callable[[], Any]


class Counting:
    """Each part is tried by itself. Answers are plain data, by name of the system or engine."""

    def __init__(self, plan: Plan, engines: Mapping[bool, Worker]) -> None:
        """Of engines that are warm; the key says whether it has the plugin."""
        self._plan = plan
        self._engines = engines

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Those that this device allows."""
        on_gpu = self._plan.device == "cuda"
        if on_gpu and True in self._engines:
            yield "launches", self.launches
        if on_gpu:
            yield "replays", self.replays
            yield "busy", self.busy
        yield "recompilation", self.recompilation
        if on_gpu:
            yield "waits", self.waits  # at last: nothing undoes it

    def launches(self) -> dict[str, Any]:
        """Prompts pruned together, and no token after the first: `steps` that pruned, `kernels`."""
        before = self._ask(True, "rpc", "himap_stats")["steps"]
        traced = self._ask(True, "traced", self._load(self._plan.systems[-1], batch=16))
        steps = self._ask(True, "rpc", "himap_stats")["steps"] - before
        return {"steps": steps, "kernels": traced["kernels"]}

    def replays(self) -> dict[str, Any]:
        """By system: `full_graphs` that its engine has, `calls` of CUDA per decode step of one."""
        found = {}
        for system in self._systems():
            short, long = (
                self._ask(system.plugin, "traced", self._load(system, tokens=tokens))["calls"]
                for tokens in (1, 1 + DECODE_STEPS)
            )
            found[system.name] = {
                "full_graphs": self._ask(system.plugin, "rpc", "bench_full_graphs"),
                "calls": {
                    name: (long[name] - short.get(name, 0)) / DECODE_STEPS for name in sorted(long)
                },
            }
        return found

    def busy(self) -> list[dict[str, Any]]:
        """`device_ms` of one lone prompt, by `text_tokens` and `system`."""
        return [
            {
                "text_tokens": text,
                "system": system.name,
                "device_ms": self._ask(system.plugin, "traced", self._load(system, text=text))[
                    "device_ms"
                ],
            }
            for text in self._plan.text_tokens
            for system in self._systems()
        ]

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
            for system in self._systems():
                for batch in (1, 16) if system.plugin == plugin else ():
                    load = self._load(system, batch, tokens=1 + DECODE_STEPS)
                    self._ask(plugin, "load", load)
            found["himap" if plugin else "stock"] = self._ask(plugin, "rpc", "bench_waits_seen")
        return found

    def _systems(self) -> list[System]:
        return [system for system in self._plan.systems if system.plugin in self._engines]

    def _load(
        self, system: System, batch: int = 1, text: int | None = None, tokens: int = 1
    ) -> Load:
        text = text or self._plan.text_tokens[0]
        return Load(batch, batch, text, tokens, system.ratios)

    def _ask(self, plugin: bool, method: str, *arguments: Any) -> Any:
        return self._engines[plugin].call(CALL_SECONDS, method, *arguments)
