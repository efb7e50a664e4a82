# SPDX-License-Identifier: Apache-2.0
"""What the number of KV cache groups costs the scheduler: `python -m bench.kv_groups`.

No engine runs: vLLM's KV cache manager, and the plugin's, get 32 layers cut at (2, 8) in stock
vLLM's one group and in the groups of each `kv_grouping`, with the same memory.

* Scheduler time: CPU time to hash, look up, allocate, publish and free one prompt after another,
  none of which is in the cache, in turns with stock vLLM's.
* Block tables: bytes on the device for one sequence of the greatest length.
* Prefix hits: share of prompt tokens that the prefix cache has, for unpruned traffic that lives on
  it. Hits end where the blocks of all stages do.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, get_args

# First: it sets Triton's interpreter up, before anything imports Triton.
import tests.environment  # noqa: F401

# isort: split
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from bench.tables import table
from himap_vllm.core.kv_cache_manager import make_pruning_manager
from himap_vllm.core.stage_kv_cache_manager import StageAttentionSpec
from himap_vllm.plan.cuts import KVGrouping
from himap_vllm.plan.grouping import Grouping, choose_grouping
from himap_vllm.plan.prompt import ImageTokens, PromptPlan, Ratios
from himap_vllm.plan.waiting import PassedOver

LAYERS = (2, 6, 24)
BLOCK = 16  # tokens, vLLM's default on a GPU
MEMORY = 40_000  # tokens of all layers
PROMPT = 2000
LONGEST = 131_072  # tokens of a sequence
IMAGE = ImageTokens(((100, 1828),))  # three images of 576 tokens, as one
REPEATS = 200


class Cache:
    """A manager and its requests, one after the other.

    * `vllm.v1.core.kv_cache_manager.KVCacheManager` (called): as the scheduler does. Remove when:
      vLLM reports the scheduler's time.
    """

    def __init__(self, grouping: Grouping | None) -> None:
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        specs: list[FullAttentionSpec] = [FullAttentionSpec(block_size=BLOCK, **shape)]
        num_blocks, aligned, stages = MEMORY // BLOCK, BLOCK, []
        if grouping is not None:
            stages = [stage for stage, n in enumerate(grouping.parts) for _ in range(n)]
            specs = [
                StageAttentionSpec(block_size=grouping.block_sizes[stage], stage=stage, **shape)
                for stage in stages
            ]
            num_blocks, aligned = MEMORY * sum(LAYERS) // grouping.page, grouping.alignment
        self.manager: Any = KVCacheManager(
            KVCacheConfig(
                num_blocks=1 + num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec([f"{i}"], spec) for i, spec in enumerate(specs)],
            ),
            max_model_len=LONGEST,
            scheduler_block_size=aligned,
            hash_block_size=BLOCK,
        )
        self.plans: dict[str, PromptPlan] = {}
        if grouping is not None:
            make_pruning_manager(self.manager, stages, self.plans, PassedOver())
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._params = SamplingParams(max_tokens=1)
        self._params.update_from_generation_config({}, 0)

    def run(self, tokens: list[int], plan: PromptPlan | None = None) -> tuple[int, float]:
        """Run a prompt whole, and end it; returns cached tokens and seconds."""
        name = "request"
        request = Request(name, tokens, self._params, None)
        began = time.thread_time()
        request._block_hasher = self._hasher
        request.update_block_hashes()
        if plan is not None:
            self.plans[name] = plan
        blocks, num_computed, *_ = self.manager.get_computed_blocks(request)
        num_new = len(tokens) - num_computed
        assert self.manager.allocate_slots(request, num_new, num_computed, blocks) is not None
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = len(tokens)
        self.manager.free(request)
        if self.plans.pop(name, None) is not None:
            self.manager.himap_prefixes.forget(name)
        return num_computed, time.thread_time() - began


def scheduler_times(caches: dict[str, Cache], pruned: bool) -> dict[str, float]:
    """Seconds per prompt, in turns; stock vLLM's prompt is unpruned."""
    plan = PromptPlan(PROMPT, (IMAGE,), (Ratios(0.5, 0.75),)) if pruned else None
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(REPEATS):
        tokens = [rng.randrange(30_000) for _ in range(PROMPT)]
        for name, cache in caches.items():
            seconds[name].append(cache.run(tokens, None if name == "stock" else plan)[1])
    return {name: median(of) for name, of in seconds.items()}


def conversations(rng: random.Random) -> Iterator[list[int]]:
    """50 chats of 6 turns in turns, behind one system prompt of 300 tokens."""
    chats = [[*range(300)] for _ in range(50)]
    for _ in range(6):
        for chat in chats:
            chat += (rng.randrange(30_000) for _ in range(rng.randrange(20, 120)))
            yield list(chat)
            chat += (rng.randrange(30_000) for _ in range(rng.randrange(40, 200)))


def questions(rng: random.Random) -> Iterator[list[int]]:
    """400 questions about 20 documents of 600 to 1,500 tokens."""
    documents = [
        [rng.randrange(30_000) for _ in range(rng.randrange(600, 1500))] for _ in range(20)
    ]
    for _ in range(400):
        yield [*rng.choice(documents), *(rng.randrange(30_000) for _ in range(30))]


def system_prompts(rng: random.Random) -> Iterator[list[int]]:
    """400 short questions behind one of 8 system prompts of 50 to 400 tokens."""
    prompts = [[rng.randrange(30_000) for _ in range(rng.randrange(50, 400))] for _ in range(8)]
    for _ in range(400):
        yield [*rng.choice(prompts), *(rng.randrange(30_000) for _ in range(60))]


TRAFFIC: dict[str, Callable[[random.Random], Iterator[list[int]]]] = {
    "conversations": conversations,
    "questions on documents": questions,
    "system prompts": system_prompts,
}


def hits(grouping: Grouping | None) -> list[tuple[float, float]]:
    """Per traffic: share of prompt tokens found, and tokens computed per prompt."""
    found = []
    for traffic in TRAFFIC.values():
        cache, cached, total, prompts = Cache(grouping), 0, 0, 0
        for tokens in traffic(random.Random(1)):
            cached += cache.run(tokens)[0]
            total += len(tokens)
            prompts += 1
        found.append((cached / total, (total - cached) / prompts))
    return found


def main() -> int:
    """Entry point; returns the exit code."""
    init_none_hash(sha256)
    groupings: dict[str, Grouping | None] = {"stock": None}
    for name in get_args(KVGrouping):
        groupings[name] = choose_grouping(name, LAYERS, BLOCK, BLOCK)
    caches = {name: Cache(grouping) for name, grouping in groupings.items()}
    unpruned, pruned = (scheduler_times(caches, pruning) for pruning in (False, True))
    rows = []
    for name, grouping in groupings.items():
        sizes, parts = ((BLOCK,), (1,)) if grouping is None else (
            grouping.block_sizes, grouping.parts,
        )  # fmt: skip
        blocks = sum(n * -(-PROMPT // size) for size, n in zip(sizes, parts, strict=True))
        entries = sum(n * -(-LONGEST // size) for size, n in zip(sizes, parts, strict=True))
        rows.append(
            [
                name,
                f"{sum(parts)}",
                "/".join(map(str, sizes)),
                f"{blocks}",
                f"{1e3 * unpruned[name]:.2f} ({unpruned[name] / unpruned['stock']:.2f})",
                f"{1e3 * pruned[name]:.2f} ({pruned[name] / pruned['stock']:.2f})",
                f"{8 * entries / 1024:.0f}",
                *(f"{share:.1%} ({left:.0f})" for share, left in hits(grouping)),
            ]
        )
    head = ["kv_grouping", "groups", "tokens per block", f"blocks of {PROMPT:,} tokens"]
    head += ["ms per unpruned prompt (x stock)", "ms per pruned prompt (x stock)"]
    head += [f"block tables of {LONGEST:,} tokens, KiB"]
    head += [f"{name}: found (computed per prompt)" for name in TRAFFIC]
    print(table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
