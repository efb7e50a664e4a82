# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against vLLM with pruning: `python bench.py [MODEL]`. `bench/` has more benchmarks."""

import argparse
import time
from statistics import median

from bench.pair import both, chat, engine, options


def measure(args: argparse.Namespace, himap: str) -> list[float]:
    """One engine: first token of a lone request (ms), tokens/s of many, KV blocks used and all."""
    llm = engine(args, himap)
    from vllm import SamplingParams

    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    chats = [chat("What is in the picture?", number) for number in range(8 + args.n)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    alone = [llm.chat([one], params, use_tqdm=False)[0].metrics for one in chats[:8]]
    blocks, used = pool.get_num_free_blocks(), 0
    llm.enqueue_chat(chats[8:], params, use_tqdm=False)
    began = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        used = max(used, blocks - pool.get_num_free_blocks())
    speed = 32 * args.n / (time.perf_counter() - began)
    return [1000 * median(one.first_token_latency for one in alone[2:]), speed, used, blocks]


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("-n", type=int, default=16, help="requests at once (default 16)")
    stock, pruned = both(measure, parser.parse_args())
    print(f"\n{'':26}{'stock':>22}{'pruned':>22}")
    for row, name in enumerate(("time to first token, ms", "tokens per second")):
        a, b = stock[row], pruned[row]
        print(f"{name:26}{a:22.1f}{b:22.1f}   x {b / a:.2f}")
    # A pruned engine's blocks hold fewer layers, hence there are more of them: compare the shares.
    shares = [f"{used:.0f} of {free:.0f} ({used / free:.1%})" for *_, used, free in (stock, pruned)]
    print(f"{'KV blocks in use, at most':26}" + "".join(f"{share:>22}" for share in shares))
