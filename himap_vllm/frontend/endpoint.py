# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.endpoint_plugins`: `GET /plugins/himap/stats` on vLLM's own API server.

Opt-in, as vLLM demands of endpoint plugins: `VLLM_PLUGINS=himap,himap_stats` (both: the variable
filters the general plugin, too).
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.datastructures import State
from starlette.requests import Request

from himap_vllm.config import is_requested
from himap_vllm.frontend.merged_stats import engine_stats
from himap_vllm.frontend.support import is_configured


class StatsEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = "himap_stats"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/plugins/himap/stats", _stats, methods=["GET"])

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:  # noqa: ARG002
        """Remember the engine.

        Raises:
            RuntimeError: pruning is configured, but its general plugin is not loaded.
        """
        config = engine_client.vllm_config
        if is_requested(config.additional_config) and not is_configured(config):
            raise RuntimeError("VLLM_PLUGINS names himap_stats but not himap; name both")
        state.himap_engine = engine_client


async def _stats(request: Request) -> dict[str, Any]:
    """Counters since the engine started; see `himap_vllm.pruning.stats.PruningStats`."""
    engine = request.app.state.himap_engine
    if not is_requested(engine.vllm_config.additional_config):
        raise HTTPException(404, 'pruning is off: no "himap" in --additional-config')
    return await engine_stats(engine)
