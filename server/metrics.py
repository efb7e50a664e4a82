# SPDX-License-Identifier: Apache-2.0
"""The plugin's counters as Prometheus metrics, read from the engine at every scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from himap_vllm.stats import engine_stats

_PLAIN = {
    "recomputed": ("himap_recomputed", "pruned prompts computed again after a preemption"),
    "kv_blocks": ("himap_kv_blocks", "KV blocks allocated to pruned prompts at prefill"),
    "kv_blocks_saved": ("himap_kv_blocks_saved", "KV blocks not allocated, thanks to pruning"),
    "kv_bytes_saved": ("himap_kv_saved_bytes", "the same in bytes"),
    "steps": ("himap_pruning_steps", "engine steps that pruned"),
    "pruning_seconds": ("himap_pruning_seconds", "host time of scoring and selection"),
}
_TOKENS = {
    "image_tokens": "0",
    "image_tokens_kept_shallow": "1",
    "image_tokens_kept_deep": "2",
}


class _Snapshot(Collector):
    def __init__(self, stats: dict[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "himap_requests", "prompts with images by outcome", labels=["outcome"]
        )
        for outcome, count in self._stats["requests"].items():
            requests.add_metric([outcome], count)
        yield requests
        tokens = CounterMetricFamily(
            "himap_image_tokens", "image tokens of pruned prompts in each stage", labels=["stage"]
        )
        for key, stage in _TOKENS.items():
            tokens.add_metric([stage], self._stats[key])
        yield tokens
        for key, (name, text) in _PLAIN.items():
            yield CounterMetricFamily(name, text, value=self._stats[key])


async def himap_metrics(engine: Any) -> bytes:
    """The plugin's counters in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(await engine_stats(engine)))
    return generate_latest(registry)
