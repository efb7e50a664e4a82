# SPDX-License-Identifier: Apache-2.0
"""Starts the engine's client in this process, gives vLLM's handlers to the app, and watches both.

* `vllm.entrypoints.launchers.api_server.app_state.init_app_state` (called): makes the handlers of
  the OpenAI API as vLLM's server does. Remove when: an endpoint plugin of vLLM can wrap vLLM's
  routes.
* `vllm.utils.gc_utils.freeze_gc_heap` (called): as in vLLM's server, the garbage collector need not
  search what exists once the model is loaded. Remove when: vLLM's server code starts the engine.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property
from typing import Any

from fastapi import FastAPI
from typing_extensions import override
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM

from himap_vllm.config import DEEP_ARG, SHALLOW_ARG, engine_settings
from himap_vllm.frontend.admission import admission_of

from .bundled import is_bundled
from .gateway import Gateway, ServedModel
from .lifecycle import GatewayServer, Lifecycle, Phase
from .metrics import GatewayMetrics
from .playground.routes import address, is_on
from .prompts import PromptObserver, placeholder_tokens
from .pruning import PruningPolicy
from .record import current
from .reduction import reduction_of
from .settings import GatewaySettings
from .shared_memory import SharedMemoryError, check_shared_memory
from .short_json import shorten
from .step_size import EngineArgs
from .tracing.families import LayoutFinder
from .tracing.tracer import Tracer
from .warm_up import warm_up

logger = init_logger("vllm.himap.server")

_PROGRESS_SECONDS = 5.0


class _ObservedLLM(AsyncLLM):
    """vLLM's engine client, which also writes what it yields into the record of the request.

    * `vllm.v1.engine.async_llm.AsyncLLM.generate` (overridden): vLLM's handlers call it without the
      HTTP request, so the record comes from `record.current`. Beam search calls it for each of its
      steps with parameters of its own, in which `vllm_xargs` are missing. Remove when: vLLM reports
      a request's tokens and times to its caller, and its beam search passes on `vllm_xargs`.
    """

    @cached_property
    def _writes_short_json(self) -> bool:
        grammars = self.vllm_config.structured_outputs_config
        return grammars.backend == "xgrammar" and is_bundled(self.vllm_config.model_config.model)

    @override
    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`."""
        record = current.get(None)
        if record is not None and record.beam_search:
            args[1].extra_args = {SHALLOW_ARG: 0.0, DEEP_ARG: 0.0}
        if self._writes_short_json and args[1].structured_outputs is not None:
            shorten(args[1].structured_outputs)
        outputs = super().generate(*args, **kwargs)
        # Closing it at once when the client goes away aborts the request.
        async with aclosing(outputs):
            async for output in outputs if record is None else record.watch(outputs):
                yield output


async def run_engine(
    app: FastAPI,
    args: Namespace,
    settings: GatewaySettings,
    lifecycle: Lifecycle,
    metrics: GatewayMetrics,
    server: GatewayServer,
) -> None:
    """Load the model, serve, and watch until cancelled; a failure ends the server."""
    engine: Any = None
    progress = asyncio.create_task(_tell_progress(str(args.model)))
    try:
        # In a thread, so that the probes answer meanwhile.
        engine = await asyncio.to_thread(_start, args)
        config = engine.vllm_config
        pruning = engine_settings(config.additional_config)
        assert pruning is not None
        metrics.describe(pruning)
        gateway: Gateway = app.state.gateway
        gateway.media.placeholders = placeholder_tokens(engine)
        if not args.trust_request_mm_kwargs:  # a request could ask for a larger size
            gateway.media.reduction = reduction_of(engine)
        admission = admission_of(engine.input_processor)
        assert admission is not None
        admission.second_step = PromptObserver(config, pruning, settings.max_prompt_tokens).observe
        await init_app_state(engine, app.state, args, await engine.get_supported_tasks())
        policy = PruningPolicy(pruning, settings.low_detail)
        finder = LayoutFinder.of_engine(engine, fixed=not args.trust_request_mm_kwargs)
        tracer = Tracer(engine, finder, settings.allow_traces)
        gateway.loaded = ServedModel.from_vllm(app.state, policy, tracer)
        await warm_up(engine)
        app.openapi()  # takes seconds the first time: do it before requests come
        freeze_gc_heap()
        lifecycle.phase = Phase.READY
        progress.cancel()
        logger.info("ready: %s", args.model)
        if is_on(args.host, settings.playground):
            logger.info("playground: %s", address(args.host, args.port, args.root_path or ""))
        else:
            logger.info("playground: off (--playground, or --host 127.0.0.1)")
        while not engine.errored:
            await asyncio.sleep(0.5)
        if lifecycle.phase is Phase.DRAINING and not lifecycle.in_flight:
            return  # a signal to the process group stopped the engine, too; nothing was in flight
        logger.error("the engine is dead: %s", engine.dead_error)
        server.fail()
    except asyncio.CancelledError:
        raise
    except SharedMemoryError as error:
        logger.error("the engine did not start: %s", error)
        server.fail()
    except Exception:
        logger.exception("the engine did not start")
        server.fail()
    finally:
        progress.cancel()
        if engine is not None:
            engine.shutdown(timeout=0)


async def _tell_progress(model: str) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        logger.info("loading %s: %.0f s", model, time.monotonic() - started)


def _start(args: Namespace) -> AsyncLLM:
    config = EngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    check_shared_memory(config)
    return _ObservedLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
