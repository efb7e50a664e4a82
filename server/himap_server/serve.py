# SPDX-License-Identifier: Apache-2.0
"""`himap serve [MODEL] [any vllm serve flag]`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import uvicorn
import uvloop
import yaml
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.config import StructuredOutputsConfig
from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logger import configure_logging_from_args, init_logger
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from himap_vllm.config import ADDITIONAL_CONFIG_KEY, EngineSettings, HiMAPError
from himap_vllm.vllm_versions import (
    MEDIA_BYTES,
    FrontendArgs,
    cli_env_setup,
    limit_media,
    make_arg_parser,
    validate_parsed_serve_args,
)

from .app import build_app
from .bundled import BundledModel, bundled_model, is_bundled
from .checked_images import CONNECTOR
from .engine import run_engine
from .http import BoundedHttp
from .lifecycle import GatewayServer, Lifecycle, Phase
from .memory import available_memory
from .metrics import GatewayMetrics
from .middleware import REQUEST_ID_HEADER, RequestMiddleware
from .record import RequestRecord
from .request_log import log_request
from .security.keys import KeyFileError, KeyRing
from .security.limits import KeyLimits
from .security.shared_limits import SharedCounts
from .settings import GatewaySettings, SettingsError, add_flags, load, setting_names, split_file

logger = init_logger("vllm.himap.server")

_DEFAULT_CPU_KV_BYTES = 4 << 30
_CPU_PROCESSES_BYTES = 2 << 30  # gateway, engine core and a worker, before model and KV cache
_MAX_N_SEQUENCES = "128"
_SWITCH_SECONDS = 0.001  # for so long a thread that parses may keep the event loop waiting
_BUNDLED_TOOL_PARSER = "hermes"
_LAST_SECONDS = 10.0  # from the end of a request's time to the end of its answer

# Flags of vLLM's HTTP server that its handlers or this module read. The others would have no
# effect, so they are refused.
_SERVED = frozenset({
    "allow_credentials", "allowed_headers", "allowed_methods", "allowed_origins",
    "chat_template", "chat_template_content_format", "default_chat_template_kwargs",
    "enable_auto_tool_choice", "enable_force_include_usage", "enable_log_deltas",
    "enable_log_outputs", "enable_per_request_metrics", "enable_prompt_tokens_details",
    "enable_server_load_tracking",
    "exclude_tools_when_tool_choice_none", "host", "log_error_stack", "lora_modules", "max_log_len",
    "port", "reasoning_effort_map", "response_role", "return_tokens_as_token_ids", "root_path",
    "tool_call_parser", "tool_parser_plugin", "tool_server", "tool_strict_level",
    "trust_request_chat_template", "trust_request_mm_kwargs", "uvicorn_log_level",
})  # fmt: skip
_NOT_SERVED = (
    {field.name for field in fields(FrontendArgs)} - _SERVED
    | {"headless", "grpc", "api_server_count", "allowed_media_domains", "allowed_local_media_path"}
)  # fmt: skip

# Environment variables that are refused. The store of the Responses API keeps everything, and shows
# it to anyone who knows an id.
_NOT_SERVED_ENVIRONMENT = {
    "VLLM_API_KEY": "use --api-keys-file",
    "VLLM_ENABLE_RESPONSES_API_STORE": "himap serve stores no responses",
    "VLLM_SERVER_DEV_MODE": "himap serve has none of its routes",
    "VLLM_MAX_IMAGE_PIXELS": "use --max-image-pixels",
    MEDIA_BYTES: "use --max-request-pixels",
    "VLLM_MEDIA_CONNECTOR": "himap serve fetches images itself",
}

# Loggers whose messages at INFO and WARNING can contain what clients sent.
_TALKATIVE = ("vllm.renderers", "vllm.entrypoints", "vllm.tool_parsers", "vllm.reasoning")


def parse_arguments(argv: list[str]) -> tuple[Namespace, GatewaySettings]:
    """Parse the command line.

    Returns:
        The flags of `vllm serve` with the plugin's settings in them, and the gateway's settings.

    Raises:
        SystemExit: something is wrong, as argparse does.
    """
    parser = FlexibleArgumentParser(
        prog="himap serve", description="Serve a vision-language model with HiMAP pruning."
    )
    add_flags(parser)
    parser = make_arg_parser(parser)
    try:
        argv, file = _take_file(parser, argv)
        args = parser.parse_args(argv)
        given = {name: getattr(args, name) for name in setting_names()}
        settings, engine = load(given, file)
        bundled = None
        if args.model_tag is None and args.model == parser.get_default("model"):
            bundled = bundled_model()
            engine = {**bundled.engine, **engine}
        EngineSettings.parse(engine)
    except (SettingsError, HiMAPError, ImportError) as error:
        parser.error(str(error))
    for name in sorted(_NOT_SERVED):
        if getattr(args, name, None) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not supported by himap serve")
    for name, instead in _NOT_SERVED_ENVIRONMENT.items():
        if os.environ.get(name, "0") not in ("", "0"):
            parser.error(f"{name} is not supported: {instead}")
    # vLLM takes images from the gateway only, and as a second check counts their pixels.
    os.environ["VLLM_MEDIA_CONNECTOR"] = CONNECTOR
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(settings.max_image_pixels)
    limit_media(settings.max_request_pixels)
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", _MAX_N_SEQUENCES)
    # A signal to the process group reaches the engine core, too, which must not drop requests.
    args.shutdown_timeout = args.shutdown_timeout or math.ceil(settings.grace_seconds)
    if bundled is not None:
        _serve_bundled(args, bundled, parser.get_default("tool_strict_level"))
    elif args.model_tag is not None:
        args.model = args.model_tag
    validate_parsed_serve_args(args)
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: engine}
    return args, settings


def _serve_bundled(args: Namespace, bundled: BundledModel, default_strict_level: Any) -> None:
    if args.structured_outputs_config == StructuredOutputsConfig():
        # It was trained on no JSON, and writes nothing but white space where JSON may have any.
        args.structured_outputs_config = StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True
        )
    if args.tool_call_parser is None:  # so that examples with tools work as they are
        args.tool_call_parser = _BUNDLED_TOOL_PARSER
        args.enable_auto_tool_choice = True
        if args.tool_strict_level == default_strict_level:
            args.tool_strict_level = "parameter"  # it keeps to no schema by itself
    args.model = str(bundled.path)
    args.served_model_name = args.served_model_name or [bundled.name]


def _take_file(parser: FlexibleArgumentParser, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Read `--config FILE`.

    Returns:
        `argv` with the file's flags of vLLM before its own, and the file's other settings.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(argv)
    if found.config is None:
        return argv, {}
    ours, vllms = split_file(found.config)
    model = [str(vllms.pop("model"))] if "model" in vllms else []
    if rest and not rest[0].startswith("-"):
        model, rest = rest[:1], rest[1:]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as rewritten:
        yaml.safe_dump(vllms, rewritten)
        rewritten.flush()
        flags = parser.load_config_file(rewritten.name)
    return [*model, *flags, *rest], ours


def _choose_cpu_memory(args: Namespace) -> None:
    """On CPU, vLLM does not start unless 92 % of the memory is free. Ask for less."""
    chosen = (
        args.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or args.gpu_memory_utilization != AsyncEngineArgs.gpu_memory_utilization
    )
    if not current_platform.is_cpu():
        return
    available = available_memory()
    if available < _CPU_PROCESSES_BYTES:
        logger.warning(
            "%d MiB of memory are left; the server's processes need about %d MiB besides model and "
            "KV cache, and may be ended for lack of it",
            available >> 20,
            _CPU_PROCESSES_BYTES >> 20,
        )
    if not chosen:
        args.kv_cache_memory_bytes = min(_DEFAULT_CPU_KV_BYTES, available // 4)
        logger.info("KV cache: %d MiB (--kv-cache-memory-bytes)", args.kv_cache_memory_bytes >> 20)


def _import_plugins(args: Namespace) -> None:
    """Import what `--tool-parser-plugin` and `--reasoning-parser-plugin` name, as vLLM does."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def _configure_logging(args: Namespace) -> None:
    """Let all processes log JSON lines, unless `--logging-config` says otherwise."""
    if not hasattr(args, "logging_config"):
        args.logging_config = replace(LoggingConfig(), formatter="json")
    configure_logging_from_args(args)
    if logging.getLogger("vllm").level > logging.DEBUG:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        if is_bundled(args.model):
            # Its answers often end within a call, for which vLLM logs a traceback.
            logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)
    for name in ("uvicorn", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers = logging.getLogger("vllm").handlers if name == "uvicorn" else []
        log.propagate = name != "uvicorn"


def _for_browsers(app: ASGIApp, args: Namespace) -> ASGIApp:
    """The app with answers to CORS preflights, if the operator allows origins."""
    if not args.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=args.allowed_origins,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
        allow_credentials=args.allow_credentials,
        expose_headers=[REQUEST_ID_HEADER, "retry-after", "endpoint-load-metrics"],
    )


def _shared_counts(settings: GatewaySettings) -> SharedCounts | None:
    if settings.limits_storage is None:
        return None
    lease = settings.request_timeout + _LAST_SECONDS
    return SharedCounts(settings.limits_storage.get_secret_value(), lease)


async def serve(args: Namespace, settings: GatewaySettings, keys: KeyRing | None) -> int:
    """Serve until stopped; returns the process's exit status."""
    lifecycle = Lifecycle(settings.grace_seconds)
    app = build_app(args, settings, lifecycle)
    metrics = GatewayMetrics((args.served_model_name or [args.model])[0], lifecycle)

    def report(record: RequestRecord) -> None:
        metrics.observe(record)
        log_request(record)

    counts = _shared_counts(settings)
    if counts is not None:
        await counts.check()
    middleware = RequestMiddleware(
        app,
        lifecycle,
        keys=keys,
        limits=KeyLimits(counts, settings.limits_storage_failure),
        max_body_bytes=settings.max_body_bytes,
        request_timeout=settings.request_timeout,
        root_path=args.root_path or "",
        report=report,
    )
    config = uvicorn.Config(
        _for_browsers(middleware, args),
        host=args.host or "0.0.0.0",
        port=args.port,
        http=cast("Any", partial(BoundedHttp, header_timeout=settings.header_timeout)),
        ws="none",
        log_config=None,
        log_level=args.uvicorn_log_level,
        timeout_keep_alive=settings.keep_alive_timeout,
        access_log=False,  # request_log.py writes it
        timeout_graceful_shutdown=2,  # the grace time is over by then
        lifespan="off",
    )
    server = GatewayServer(config, lifecycle)
    app.state.server = server
    listener = config.bind_socket()  # before the model loads, so that a used port is told at once
    engine = asyncio.create_task(run_engine(app, args, settings, lifecycle, metrics, server))
    await server.serve(sockets=[listener])
    if lifecycle.phase is Phase.LOADING:
        # Stopped while loading. The loading thread can't be cancelled, and a normal exit would
        # wait for it.
        for child in psutil.Process().children(recursive=True):
            child.terminate()
        os._exit(0)
    engine.cancel()
    closing = [app.state.gateway.media.close()] + ([counts.close()] if counts is not None else [])
    await asyncio.gather(engine, *closing, return_exceptions=True)
    return int(lifecycle.phase is Phase.FAILED)


def main(argv: list[str]) -> int:
    """Run `himap serve`; returns the exit status."""
    cli_env_setup()
    args, settings = parse_arguments(argv)
    sys.setswitchinterval(_SWITCH_SECONDS)
    _import_plugins(args)
    _configure_logging(args)
    _choose_cpu_memory(args)
    try:
        engine = EngineSettings.parse(args.additional_config[ADDITIONAL_CONFIG_KEY])
        keys = None if settings.api_keys_file is None else KeyRing(settings.api_keys_file, engine)
    except KeyFileError as error:
        print(f"himap serve: api-keys-file: {error}", file=sys.stderr)
        return 2
    return uvloop.run(serve(args, settings, keys))
