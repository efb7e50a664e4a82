# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM, then vLLM with pruning: the same measurement, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from himap_demo import MODEL_PATH
from himap_demo.scenes import draw, make_scene

T = TypeVar("T")


def options(text: str | None) -> argparse.ArgumentParser:
    """Which model, pruned how, in which engine."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("model", nargs="?", default=str(MODEL_PATH), help="path or name on the hub")
    parser.add_argument("--himap", help="engine settings as JSON (default: the model's himap.json)")
    parser.add_argument("--kv-mib", type=int, default=1024, help="size of the KV cache (1024)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser


def both(measure: Callable[[argparse.Namespace, str], T], args: argparse.Namespace) -> list[T]:
    """What `measure` returns of stock and of pruned; it gets `args`, and the settings or ""."""
    own = Path(args.model, "himap.json")
    himap = args.himap or (own.read_text() if own.exists() else '{"shallow_layer": 2}')
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        return list(processes.map(measure, [args, args], ["", himap]))


def engine(args: argparse.Namespace, himap: str, **more: Any) -> Any:
    """An `LLM` in this process: stock if `himap` is empty."""
    os.environ |= {"VLLM_PLUGINS": "himap" if himap else "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    return LLM(
        args.model, max_model_len=2048, kv_cache_memory_bytes=args.kv_mib << 20,
        enforce_eager=args.eager, enable_prefix_caching=False, disable_log_stats=False,
        limit_mm_per_prompt={"image": 1},
        additional_config={"himap": json.loads(himap)} if himap else {}, **more,
    )  # fmt: skip


def chat(question: str, number: int | None = None, before: str = "") -> list[Any]:
    """Messages with a question about picture `number`, after a text `before`; None: no picture."""
    parts: list[Any] = [{"type": "text", "text": before}] if before else []
    if number is not None:
        parts.append({"type": "image_pil", "image_pil": draw(make_scene(number))})
    parts.append({"type": "text", "text": question})
    return [{"role": "user", "content": parts}]
