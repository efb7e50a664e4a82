# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning: `python bench.py [MODEL]`. `bench/` has more benchmarks.

Each engine gets the same pictures and a KV cache of the same size. Blocks of the pruned engine hold
fewer layers, hence there are more of them: compare the shares in use.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from himap_demo import MODEL_PATH
from himap_demo.scenes import draw, make_scene

ROWS = ("time to first token, ms", "tokens per second")


def measure(args: argparse.Namespace, himap: str) -> list[float]:
    """One engine: first token of a lone request (ms), tokens/s of many, KV blocks used and all."""
    os.environ |= {"VLLM_PLUGINS": "himap" if himap else "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, max_model_len=2048, kv_cache_memory_bytes=args.kv_mib << 20,
        enforce_eager=args.eager, enable_prefix_caching=False, disable_log_stats=False,
        limit_mm_per_prompt={"image": 1},
        additional_config={"himap": json.loads(himap)} if himap else {},
    )  # fmt: skip
    engine = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    text = {"type": "text", "text": "What is in the picture?"}
    images = [{"type": "image_pil", "image_pil": draw(make_scene(i))} for i in range(8 + args.n)]
    chats = [[{"role": "user", "content": [image, text]}] for image in images]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    alone = [llm.chat([chat], params, use_tqdm=False)[0].metrics for chat in chats[:8]]
    blocks, used = pool.get_num_free_blocks(), 0
    llm.enqueue_chat(chats[8:], params, use_tqdm=False)
    began = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        used = max(used, blocks - pool.get_num_free_blocks())
    speed = 32 * args.n / (time.perf_counter() - began)
    return [1000 * median(one.first_token_latency for one in alone[2:]), speed, used, blocks]


def main() -> None:
    """Run both engines, one after the other, each in a process of its own; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(MODEL_PATH), help="path or name on the hub")
    parser.add_argument("--himap", help="engine settings as JSON (default: the model's himap.json)")
    parser.add_argument("-n", type=int, default=16, help="requests at once (default 16)")
    parser.add_argument("--kv-mib", type=int, default=1024, help="size of the KV cache (1024)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    own = Path(args.model, "himap.json")
    himap = args.himap or (own.read_text() if own.exists() else '{"shallow_layer": 2}')
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        stock, pruned = processes.map(measure, [args, args], ["", himap])
    print(f"\n{'':26}{'stock':>22}{'pruned':>22}")
    for name, a, b in zip(ROWS, stock, pruned, strict=False):
        print(f"{name:26}{a:22.1f}{b:22.1f}   x {b / a:.2f}")
    shares = [f"{used} of {all_} ({used / all_:.1%})" for *_, used, all_ in (stock, pruned)]
    print(f"{'KV blocks in use, at most':26}" + "".join(f"{share:>22}" for share in shares))


if __name__ == "__main__":
    main()
