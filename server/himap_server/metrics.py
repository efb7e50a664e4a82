# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: the gateway's own, and the plugin's counters read from the engine at scrape.

Queries compute ratios from two counters. Labels have few values: declared routes, statuses, reasons
(`errors.Reason`), and names of API keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override
from vllm.v1.metrics.buckets import (
    INTER_TOKEN_LATENCY_BUCKETS,
    REQUEST_LATENCY_BUCKETS,
    TIME_TO_FIRST_TOKEN_BUCKETS,
)

from himap_vllm.config import EngineSettings
from himap_vllm.frontend.merged_stats import engine_stats

from .errors import Reason
from .lifecycle import Lifecycle
from .record import RequestRecord

_BY_MODEL = ["model_name"]
_BY_PRUNED = ["model_name", "pruned"]

_REQUESTS = Counter(
    "himap_http_requests", "requests to /v1", ["model_name", "route", "status", "key"]
)
_REFUSED = Counter("himap_refused_requests", "requests not answered", ["model_name", "reason"])
_IN_FLIGHT = Gauge("himap_requests_in_flight", "requests being worked on", _BY_MODEL)
_FIRST_TOKEN = Histogram(
    "himap_time_to_first_token_seconds",
    "from a request's arrival at the gateway to its first token",
    _BY_PRUNED,
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
)
_OUTPUT_TOKEN = Histogram(
    "himap_time_per_output_token_seconds",
    "mean of a request's tokens after the first",
    _BY_PRUNED,
    buckets=INTER_TOKEN_LATENCY_BUCKETS,
)
_DURATION = Histogram(
    "himap_e2e_request_latency_seconds",
    "from a request's arrival at the gateway to the end of its answer",
    _BY_PRUNED,
    buckets=REQUEST_LATENCY_BUCKETS,
)
_QUEUE = Histogram(
    "himap_request_queue_time_seconds",
    "waiting for the engine's scheduler",
    _BY_PRUNED,
    buckets=REQUEST_LATENCY_BUCKETS,
)
_OVERHEAD = Histogram(
    "himap_gateway_overhead_seconds",
    "from a request's last byte to vLLM's handler, without fetching images",
    _BY_PRUNED,
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
)
_FETCH = Histogram(
    "himap_image_fetch_seconds",
    "fetching a request's images",
    _BY_MODEL,
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
)
_DECODE = Histogram(
    "himap_image_decode_seconds",
    "decoding a request's images into pixels, the sum over the images",
    _BY_MODEL,
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
)
_IMAGES = Counter("himap_images", "images in requests that reached the engine", _BY_MODEL)
_DETAIL_IMAGES = Counter(
    "himap_detail_images", "the same by the detail that was asked for", [*_BY_MODEL, "detail"]
)
_DETAIL_TOKENS = Counter(
    "himap_detail_image_tokens",
    "image tokens by the detail that was asked for, as each stage computes them",
    [*_BY_MODEL, "detail", "stage"],
)
_PROMPT_TOKENS = Counter(
    "himap_prompt_tokens", "tokens of prompts that were answered, by kind", [*_BY_MODEL, "kind"]
)
_SAVINGS = {
    "kv_tokens": Counter(
        "himap_prompt_kv_tokens", "KV entries of prompts with images, over layers", _BY_MODEL
    ),
    "kv_tokens_unpruned": Counter(
        "himap_prompt_kv_tokens_unpruned", "what they would be without pruning", _BY_MODEL
    ),
    "prefill_flops": Counter(
        "himap_prefill_flops", "decoder FLOPs of prompts with images, nothing cached", _BY_MODEL
    ),
    "prefill_flops_unpruned": Counter(
        "himap_prefill_flops_unpruned", "what they would be without pruning", _BY_MODEL
    ),
}

_SHARES = (0.03125, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)
_KEPT = Histogram(
    "himap_prompt_kept_share",
    "share of a prompt's image tokens that is left in a stage, of all prompts with images",
    ["model_name", "stage"],
    buckets=_SHARES,
)
_SETTINGS = ("shallow_layer", "deep_layer", "shallow_ratio", "deep_ratio", "criterion")
_INFO = Gauge(
    "himap_info",
    "always 1; the engine's cuts, default ratios and criteria",
    [*_BY_MODEL, *_SETTINGS],
)

# Reasons for answers that come from vLLM or the router.
_REASONS = {
    400: Reason.INVALID,
    404: Reason.NOT_FOUND,
    405: Reason.METHOD,
    499: Reason.CLIENT_WENT_AWAY,
    503: Reason.ENGINE_BUSY,
}

_PLAIN = {
    "recomputed": ("himap_recomputed", "pruned prompts computed again after a preemption"),
    "image_tokens_reused": (
        "himap_image_tokens_reused",
        "image tokens that the prefix cache had as they were pruned before",
    ),
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
_BY_OUTCOME = ("pruned", "reused", "unpruned")


class GatewayMetrics:
    """Counts requests by their results, and observes their times."""

    def __init__(self, model_name: str, lifecycle: Lifecycle) -> None:
        self._model = model_name
        _IN_FLIGHT.labels(model_name).set_function(lambda: lifecycle.in_flight)

    def describe(self, settings: EngineSettings) -> None:
        """Set `himap_info` to the engine's cuts, default ratios and criteria."""
        _INFO.labels(self._model, *(getattr(settings, name) for name in _SETTINGS)).set(1)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        model = self._model
        key = record.key.name if record.key is not None else ""
        _REQUESTS.labels(model, record.route or "unknown", record.status, key).inc()
        if record.status >= 400 or record.reason is not None:
            record.reason = record.reason or _REASONS.get(record.status, Reason.ERROR)
            _REFUSED.labels(model, record.reason).inc()
        if record.fetching:
            _FETCH.labels(model).observe(record.fetching)
        if record.decoding:
            _DECODE.labels(model).observe(record.decoding)
        pruned = str(record.pruned).lower() if record.images or record.savings else "no_images"
        for histogram, value in (
            (_FIRST_TOKEN, record.time_to_first_token),
            (_OUTPUT_TOKEN, record.time_per_output_token),
            (_QUEUE, record.queued),
            (_OVERHEAD, record.overhead),
            # The duration of a refusal says nothing about answers.
            (_DURATION, record.duration if record.completion_tokens else None),
        ):
            if value is not None:
                histogram.labels(model, pruned).observe(value)
        if record.completion_tokens:
            text_tokens = record.prompt_tokens - record.image_tokens
            _PROMPT_TOKENS.labels(model, "image").inc(record.image_tokens)
            _PROMPT_TOKENS.labels(model, "text").inc(text_tokens)
        for detail, image in record.images_by_detail():
            _DETAIL_IMAGES.labels(model, detail).inc()
            for stage, tokens in enumerate(astuple(image)):
                _DETAIL_TOKENS.labels(model, detail, stage).inc(tokens)
        if record.savings:
            _IMAGES.labels(model).inc(record.images)
            for name, counter in _SAVINGS.items():
                counter.labels(model).inc(sum(getattr(prompt, name) for prompt in record.savings))
            for prompt in record.savings:
                for stage, kept in ((1, prompt.kept_shallow), (2, prompt.kept_deep)):
                    _KEPT.labels(model, stage).observe(kept / prompt.image_tokens)


class _Snapshot(Collector):
    def __init__(self, stats: dict[str, Any]) -> None:
        self._stats = stats

    @override
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
        by_outcome = CounterMetricFamily(
            "himap_image_tokens_by_outcome",
            "image tokens that prompts brought: pruned, found in the prefix cache as they were "
            "pruned before, or of images that stay whole",
            labels=["outcome"],
        )
        for outcome in _BY_OUTCOME:
            by_outcome.add_metric([outcome], self._stats[f"image_tokens_{outcome}"])
        yield by_outcome
        for key, (name, text) in _PLAIN.items():
            yield CounterMetricFamily(name, text, value=self._stats[key])


async def engine_metrics(engine: Any) -> bytes:
    """The plugin's counters in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(await engine_stats(engine)))
    return generate_latest(registry)
