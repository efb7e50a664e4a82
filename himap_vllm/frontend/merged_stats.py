# SPDX-License-Identifier: Apache-2.0
"""The workers' counters, read and merged in the API process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def merge_ranks(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One engine's counters from those of its tensor-parallel workers.

    All ranks see every request and hold the same blocks; each holds its own part of the bytes.
    """
    return {**ranks[0], "kv_bytes_saved": sum(rank["kv_bytes_saved"] for rank in ranks)}


def merge_engines(engines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum the counters of data-parallel engines, which see different requests."""
    total = {key: sum(e[key] for e in engines) for key in engines[0] if key != "requests"}
    requests: Counter[str] = sum((Counter(e["requests"]) for e in engines), Counter())
    latest = max(engine["last_step_pruning_seconds"] for engine in engines)
    return {**total, "requests": dict(requests), "last_step_pruning_seconds": latest}


async def engine_stats(engine: Any) -> dict[str, Any]:
    """The counters of a running `AsyncLLM`, all its workers and data-parallel engines together."""
    return merge_engines([merge_ranks(ranks) for ranks in await _call_all(engine, "himap_stats")])


async def reset_engine_stats(engine: Any) -> None:
    """Start all these counters anew."""
    await _call_all(engine, "himap_reset_stats")


async def take_trace(engine: Any, name: str, scores: bool) -> dict[str, Any] | None:
    """The trace of a request by the name that it gave (`RequestTraces.take`), from its engine.

    All tensor-parallel workers of an engine keep the same tokens.
    """
    answers = await _call_all(engine, "himap_take_trace", name, scores)
    found: dict[str, Any] | None = next((ranks[0] for ranks in answers if ranks[0]), None)
    return found


async def _call_all(engine: Any, method: str, *args: Any) -> Any:
    """For each engine, the answers of its workers.

    * `vllm.v1.engine.core_client.AsyncMPClient.call_utility_all_async` (called):
      `AsyncLLM.collective_rpc` returns the first engine's answer only, and each engine has counters
      of its own. Remove when: `AsyncLLM.collective_rpc` returns all.
    """
    return await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, args, None
    )
