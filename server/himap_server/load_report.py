# SPDX-License-Identifier: Apache-2.0
"""The engine's load as a header of answers, for load balancers: ORCA, as vLLM's server has it."""

from __future__ import annotations

import json

from prometheus_client.registry import CollectorRegistry

FORMAT_HEADER = "endpoint-load-metrics-format"
REPORT_HEADER = "endpoint-load-metrics"
_KV_CACHE = "vllm:kv_cache_usage_perc"
_WAITING = "vllm:num_requests_waiting"


def load_report(registry: CollectorRegistry, form: str | None) -> dict[str, str]:
    """The header with the load, in the form (`TEXT` or `JSON`) that a request asks for, or none.

    Named metrics: `kv_cache_usage_perc` in [0, 1] of the fullest engine, and
    `num_requests_waiting` of all engines.
    """
    if form is None or form.strip().upper() not in ("TEXT", "JSON"):
        return {}
    values: dict[str, list[float]] = {_KV_CACHE: [], _WAITING: []}
    for metric in registry.restricted_registry(list(values)).collect():
        for sample in metric.samples:
            values[sample.name].append(sample.value)
    report = {
        "kv_cache_usage_perc": max(values[_KV_CACHE], default=0.0),
        "num_requests_waiting": sum(values[_WAITING]),
    }
    if form.strip().upper() == "JSON":
        return {REPORT_HEADER: f"JSON {json.dumps({'named_metrics': report})}"}
    pairs = ", ".join(f"named_metrics.{name}={value}" for name, value in report.items())
    return {REPORT_HEADER: f"TEXT {pairs}"}
