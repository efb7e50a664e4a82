# SPDX-License-Identifier: Apache-2.0
"""The engine in the gateway's process: starts, puts its handlers into the app, is watched."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.logger import init_logger
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from himap_vllm import admission
from himap_vllm.config import engine_settings

from .lifecycle import GatewayServer, Lifecycle, Phase
from .usage import UsageLedger

logger = init_logger("vllm.himap.server")


async def run_engine(
    app: FastAPI, args: Namespace, lifecycle: Lifecycle, server: GatewayServer
) -> None:
    """Load the model, serve, and watch until cancelled; a failure ends the server."""
    engine: Any = None
    try:
        # In a thread: the probes answer meanwhile.
        engine = await asyncio.to_thread(_start, args)
        config = engine.vllm_config
        settings = engine_settings(config.additional_config)
        assert settings is not None
        app.state.usage_ledger = UsageLedger(config, settings)
        admission.observers.append(app.state.usage_ledger.record)
        await init_app_state(engine, app.state, args, await engine.get_supported_tasks())
        lifecycle.phase = Phase.READY
        logger.info("ready")
        while not engine.errored:
            await asyncio.sleep(0.5)
        if lifecycle.phase is Phase.DRAINING and not lifecycle.in_flight:
            return  # told to stop together with this process, and done
        logger.error("the engine is dead: %s", engine.dead_error)
        server.fail()
    except asyncio.CancelledError:
        raise
    except Exception:
        logger.exception("the engine did not start")
        server.fail()
    finally:
        if engine is not None:
            engine.shutdown(timeout=0)


def _start(args: Namespace) -> AsyncLLM:
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
