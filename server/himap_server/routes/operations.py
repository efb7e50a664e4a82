# SPDX-License-Identifier: Apache-2.0
"""Probes, version and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import vllm
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

import himap_vllm

from ..gateway import GatewayDep
from ..lifecycle import Phase
from ..metrics import engine_metrics

_SCRAPE_SECONDS = 5.0

router = APIRouter(tags=["operations"])


@router.get("/version")
async def version() -> dict[str, str]:
    """Versions of the gateway and of vLLM."""
    return {"version": himap_vllm.__version__, "vllm": vllm.__version__}


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"description": "loading, draining, or the engine is dead"}
}


@router.get("/health", responses=_NOT_READY)
@router.get("/health/ready", responses=_NOT_READY)
async def ready(gateway: GatewayDep) -> JSONResponse:
    """The model answers; 503 while it loads, while the service drains, and when it is dead."""
    phase = gateway.lifecycle.phase
    status = 200 if phase is Phase.READY else 503
    return JSONResponse({"status": phase.value}, status_code=status)


@router.get("/load")
async def load(gateway: GatewayDep) -> dict[str, int]:
    """The requests to `/v1` in flight, as `server_load`."""
    return {"server_load": gateway.lifecycle.in_flight}


@router.get("/metrics", response_class=Response)
async def metrics(gateway: GatewayDep) -> Response:
    """Prometheus: vLLM's own metrics, the gateway's, and the plugin's counters."""
    text = generate_latest(get_prometheus_registry())
    if gateway.lifecycle.phase in (Phase.READY, Phase.DRAINING):
        # The engine answers between steps, and a dead one never: send the other metrics then.
        with contextlib.suppress(TimeoutError, EngineDeadError):
            engine = gateway.model.engine
            text += await asyncio.wait_for(engine_metrics(engine), _SCRAPE_SECONDS)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
