# SPDX-License-Identifier: Apache-2.0
"""Probes, version and metrics."""

from __future__ import annotations

import asyncio
import contextlib

import vllm
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

import himap_vllm

from ..lifecycle import Lifecycle, Phase
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


@router.get(
    "/health/ready",
    responses={503: {"description": "loading, draining, or the engine is dead"}},
)
async def ready(request: Request) -> JSONResponse:
    """The model answers; 503 while it loads, while the service drains, and when it is dead."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    status = 200 if lifecycle.phase is Phase.READY else 503
    return JSONResponse({"status": lifecycle.phase.value}, status_code=status)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus: vLLM's own metrics, the gateway's, and the plugin's counters."""
    text = generate_latest(get_prometheus_registry())
    if request.app.state.lifecycle.phase in (Phase.READY, Phase.DRAINING):
        # The engine answers between steps, and a dead one never; the rest must not suffer.
        with contextlib.suppress(TimeoutError, EngineDeadError):
            engine = request.app.state.engine_client
            text += await asyncio.wait_for(engine_metrics(engine), _SCRAPE_SECONDS)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
