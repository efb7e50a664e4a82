# SPDX-License-Identifier: Apache-2.0
"""`himap serve MODEL [any vllm serve flag]`."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from argparse import Namespace
from dataclasses import MISSING, fields
from typing import Any

import psutil
import uvicorn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from himap_vllm.config import ADDITIONAL_CONFIG_KEY, EngineSettings, HiMAPError

from .app import build_app
from .engine import run_engine
from .lifecycle import GatewayServer, Lifecycle, Phase
from .middleware import RequestGate

logger = init_logger("vllm.himap.server")

_DEFAULT_CPU_KV_BYTES = 4 << 30

# Flags of vLLM's own HTTP server, which is not the one that runs here: refused, not ignored.
_NOT_SERVED = (
    "api_key", "uds", "root_path", "middleware", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs",
    "allowed_origins", "disable_fastapi_docs", "sse_keep_alive_interval", "tool_parser_plugin",
    "headless", "grpc", "api_server_count", "allowed_media_domains", "allowed_local_media_path",
)  # fmt: skip


def parse_arguments(argv: list[str]) -> Namespace:
    """Flags of the gateway and of `vllm serve`.

    Raises:
        SystemExit: as argparse does.
    """
    parser = FlexibleArgumentParser(
        prog="himap serve", description="Serve a vision-language model with HiMAP pruning."
    )
    group = parser.add_argument_group("himap", "Image-token pruning; see docs/engine.md.")
    for field in fields(EngineSettings):
        kind = int if field.name.endswith(("layer", "requests")) else float
        assert field.default is not MISSING
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=None,
            help=f"(default: {field.default})",
        )
    group.add_argument(
        "--grace-seconds",
        type=float,
        default=30.0,
        help="time for requests in flight after SIGTERM (default: 30)",
    )
    args = make_arg_parser(parser).parse_args(argv)
    for name in _NOT_SERVED:
        if getattr(args, name, None) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not supported by himap serve")
    if os.environ.get("VLLM_API_KEY"):
        parser.error("VLLM_API_KEY is not supported by himap serve")
    # A second lock behind `images.check_media`: vLLM fetches from no host but this.
    args.allowed_media_domains = ["media.invalid"]
    # The engine core gets a signal to the whole process group, too; it must not drop requests.
    args.shutdown_timeout = args.shutdown_timeout or math.ceil(args.grace_seconds)
    if args.model_tag is not None:
        args.model = args.model_tag
    validate_parsed_serve_args(args)
    given = {field.name: getattr(args, field.name) for field in fields(EngineSettings)}
    settings = {key: value for key, value in given.items() if value is not None}
    try:
        EngineSettings.parse(settings)
    except HiMAPError as error:
        parser.error(str(error))
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: settings}
    _choose_cpu_memory(args)
    return args


def _choose_cpu_memory(args: Namespace) -> None:
    """On CPU vLLM asks for 92 % of the memory and refuses to start without; ask for less."""
    chosen = (
        args.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or args.gpu_memory_utilization != AsyncEngineArgs.gpu_memory_utilization
    )
    if current_platform.is_cpu() and not chosen:
        args.kv_cache_memory_bytes = min(
            _DEFAULT_CPU_KV_BYTES, psutil.virtual_memory().available // 4
        )
        logger.info("KV cache: %d MiB (--kv-cache-memory-bytes)", args.kv_cache_memory_bytes >> 20)


async def serve(args: Namespace) -> int:
    """Run until stopped; returns the process's exit status."""
    lifecycle = Lifecycle(args.grace_seconds)
    app = build_app(args, lifecycle)
    config = uvicorn.Config(
        RequestGate(app, lifecycle),
        host=args.host or "0.0.0.0",
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_graceful_shutdown=2,  # the grace time is over by then
        lifespan="off",
    )
    server = GatewayServer(config, lifecycle)
    app.state.server = server
    listener = config.bind_socket()  # first: a port in use must not wait for the model
    engine = asyncio.create_task(run_engine(app, args, lifecycle, server))
    await server.serve(sockets=[listener])
    if lifecycle.phase is Phase.LOADING:
        # Stopped while loading. The thread that loads can't be cancelled, and leaving would wait
        # for it.
        for child in psutil.Process().children(recursive=True):
            child.terminate()
        os._exit(0)
    engine.cancel()
    await asyncio.gather(engine, return_exceptions=True)
    return int(lifecycle.phase is Phase.FAILED)


def main(argv: list[str] | None = None) -> Any:
    """Entry point of the `himap` command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] != "serve":
        print("usage: himap serve MODEL [any vllm serve flag]", file=sys.stderr)
        return 2
    cli_env_setup()
    return asyncio.run(serve(parse_arguments(argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
