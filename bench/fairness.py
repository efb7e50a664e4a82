# SPDX-License-Identifier: Apache-2.0
"""Time to first token of prompts with images while others decode: stock vLLM against pruning.

    python -m bench.fairness [MODEL]

A pruned prompt is computed in one step from its first image on, so it may have to wait for a step
with that much room. `--decoding` requests decode all the time; one prompt with an image arrives
every `--every` steps, with a text before the image that leaves hardly any room in a step. The table
has the median and the 99th percentile of the time to first token.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from statistics import quantiles
from typing import Any

from himap_demo import MODEL_PATH
from himap_demo.scenes import draw, make_scene


def measure(args: argparse.Namespace, himap: str) -> tuple[list[float], int]:
    """One engine: seconds to the first token of each prompt; tokens of a prompt."""
    os.environ |= {"VLLM_PLUGINS": "himap" if himap else "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "max_model_len": 2048,
        "kv_cache_memory_bytes": args.kv_mib << 20,
        "enforce_eager": args.eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "limit_mm_per_prompt": {"image": 1},
        "max_num_seqs": 64,
        "max_num_batched_tokens": args.limit,
    }
    llm = LLM(
        args.model, additional_config={"himap": json.loads(himap)} if himap else {}, **options
    )
    engine = llm.llm_engine
    decode = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    answer = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def add_decoding() -> None:
        llm.enqueue_chat([{"role": "user", "content": "Count."}], decode, use_tqdm=False)

    def add_prompt(number: int) -> None:
        content = [
            {"type": "text", "text": "word " * args.words},
            {"type": "image_pil", "image_pil": draw(make_scene(number))},
            {"type": "text", "text": "What is it?"},
        ]
        llm.enqueue_chat([{"role": "user", "content": content}], answer, use_tqdm=False)

    for _ in range(args.decoding):
        add_decoding()
    seconds: list[float] = []
    length = 0
    numbers = count()
    for step in count():
        if step % args.every == 0 and (number := next(numbers)) < args.prompts:
            add_prompt(number)
        for output in engine.step():
            if not output.finished:
                continue
            if output.outputs[0].token_ids and len(output.outputs[0].token_ids) == 4:
                seconds.append(output.metrics.first_token_latency)
                length = len(output.prompt_token_ids)
            else:
                add_decoding()
        if len(seconds) == args.prompts:
            return seconds, length
    raise AssertionError


def main() -> None:
    """Run both engines, one after the other, each in a process of its own; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL_PATH), help="path or name on the hub")
    parser.add_argument("--himap", help="engine settings as JSON (default: the model's himap.json)")
    parser.add_argument("--decoding", type=int, default=20, help="requests that decode (20)")
    parser.add_argument("--prompts", type=int, default=100, help="prompts with an image (100)")
    parser.add_argument("--every", type=int, default=10, help="steps between two of them (10)")
    parser.add_argument("--limit", type=int, default=256, help="tokens of a step (256)")
    parser.add_argument("--words", type=int, default=70, help="before the image (70)")
    parser.add_argument("--kv-mib", type=int, default=1024, help="size of the KV cache (1024)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    own = Path(args.model, "himap.json")
    himap = args.himap or (own.read_text() if own.exists() else "{}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        results = list(processes.map(measure, [args, args], ["", himap]))
    print(f"\n{'time to first token, ms':26}{'median':>10}{'p99':>10}{'longest':>10}")
    for name, (seconds, _) in zip(("stock", "pruned"), results, strict=True):
        cuts = quantiles(seconds, n=100)
        row = (cuts[49], cuts[98], max(seconds))
        print(f"{name:26}" + "".join(f"{1000 * value:10.1f}" for value in row))
    print(
        f"prompts of {results[0][1]} tokens, steps of at most {args.limit}, {args.decoding} others "
        "decode"
    )


if __name__ == "__main__":
    main()
