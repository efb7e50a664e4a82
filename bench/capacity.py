# SPDX-License-Identifier: Apache-2.0
"""KV blocks per request, and how many requests fit a fixed KV budget, from a running engine.

`measure` runs `python -m bench.capacity` in a process of its own; there the engine runs in-process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that its scheduler can be looked at between steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.arithmetic import Cuts, blocks_per_request
from bench.model import THIN
from himap_vllm.config import DEEP_ARG, SHALLOW_ARG
from himap_vllm.plan.prompt import NUM_STAGES, Ratios

BLOCK_SIZE = 32  # tokens; the smallest that vLLM's CPU attention takes (its default is 128)
OUTPUT_TOKENS = 16
KV_BYTES = 160 << 20
POOL_WANTED = 0.98  # of the budget


@dataclass(frozen=True)
class Setting:
    """What is filled, and with what.

    Attributes:
        image_tokens: of an image.
        num_layers: of the decoder.
        token_bytes: key and value of one token in one layer.
        kv_bytes: the budget.
        block_size: tokens per block.
        batched_tokens: per step. All requests that fit must be prefilled before the first one
            has its `output_tokens`.
        output_tokens: of each request; at most `block_size`.
        engine: further arguments of `LLM`.
    """

    image_tokens: int = THIN.image_tokens
    num_layers: int = THIN.num_layers
    token_bytes: int = THIN.kv_bytes_per_token("float32") // THIN.num_layers
    kv_bytes: int = KV_BYTES
    block_size: int = BLOCK_SIZE
    batched_tokens: int = 4096
    output_tokens: int = OUTPUT_TOKENS
    engine: dict[str, Any] = field(default_factory=lambda: {"dtype": "float32"})


@dataclass(frozen=True)
class Capacity:
    """One engine's answer, beside the arithmetic one.

    Attributes:
        tokens: [NUM_STAGES] tokens of one request in each stage, with its whole answer.
        groups: [groups] stage of each KV cache group.
        layers_per_block: layers whose keys and values one block holds.
        bytes_per_block: of the engine's one block pool.
        num_blocks: blocks that requests can use; vLLM keeps one more for itself.
        budget: bytes that the pool was to have.
        blocks: blocks per running request, at the peak.
        blocks_expected: the same by arithmetic.
        kv_bytes_expected: KV cache of one request from tokens, layers and bytes alone, rounded up
            to whole blocks of tokens in each layer.
        peak: the most requests that ran at once, all with their whole prompt in the cache.
        peak_expected: the same by arithmetic.
        preemptions: how often a request was put back because blocks ran out.
        stats: the plugin's counters; None without the plugin.
    """

    tokens: tuple[int, ...]
    groups: tuple[int, ...]
    layers_per_block: int
    bytes_per_block: int
    num_blocks: int
    budget: int
    blocks: float
    blocks_expected: int
    kv_bytes_expected: int
    peak: int
    peak_expected: int
    preemptions: int
    stats: dict[str, Any] | None

    @property
    def kv_bytes(self) -> float:
        """KV cache of one request."""
        return self.blocks * self.bytes_per_block

    @property
    def pool_share(self) -> float:
        """How much of the budget has become blocks."""
        return (self.num_blocks + 1) * self.bytes_per_block / self.budget

    @property
    def memory_agrees(self) -> bool:
        """Whether blocks hold what they should, and the pool is what it should be.

        The block counts alone would not tell: what fits a pool follows from the pool's own size.
        """
        return self.kv_bytes == self.kv_bytes_expected and POOL_WANTED <= self.pool_share <= 1

    @property
    def agrees(self) -> bool:
        """Whether the engine holds exactly what the arithmetic says."""
        exact = (self.blocks, self.peak) == (self.blocks_expected, self.peak_expected)
        return exact and self.memory_agrees


def measure(
    checkpoint: Path,
    cuts: Cuts,
    pruning: bool,
    log: Path,
    setting: Setting | None = None,
    timeout: float | None = None,
) -> Capacity:
    """Fill the KV budget of an engine.

    Args:
        checkpoint: of `THIN`, or what `setting` describes.
        cuts: what pruning does; stock vLLM gets the same prompts, whose length depends on it.
        pruning: False: stock vLLM, without the plugin.
        log: where the engine's output goes; its answer is written beside it.
        setting: by default for `THIN`.
        timeout: in seconds.

    Raises:
        RuntimeError: the engine failed.
        subprocess.TimeoutExpired: it took too long, and was killed.
    """
    setting = setting or Setting()
    answer = log.with_suffix(".json")
    command = [
        sys.executable, "-m", "bench.capacity", str(checkpoint), str(answer),
        "--cuts", json.dumps(asdict(cuts)), "--setting", json.dumps(asdict(setting)),
    ]  # fmt: skip
    if pruning:
        command.append("--pruning")
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "himap" if pruning else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
        )
    if done.returncode:
        raise RuntimeError(f"the engine failed; see {log}")
    fields: dict[str, Any] = json.loads(answer.read_text())
    fields |= {name: tuple(fields[name]) for name in ("tokens", "groups")}
    return Capacity(**fields)


def _text_tokens(cuts: Cuts, setting: Setting, minimum: int = 30) -> int:
    """The shortest text with which a request needs no further block while it answers.

    Then "fits" has one meaning: what is admitted also runs to its end.
    """
    block = setting.block_size
    for text in range(minimum, minimum + block):
        before = cuts.stage_tokens(setting.image_tokens + text, setting.image_tokens)
        if all((int(t) - 1) % block + setting.output_tokens <= block for t in before):
            return text
    raise ValueError("the stages' last blocks have no common room; use --no-capacity")


def _fill(checkpoint: Path, cuts: Cuts, pruning: bool, setting: Setting) -> Capacity:
    """Inside the process of the engine."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    from himap_vllm.core.kv_cache import bytes_per_block, group_stages

    himap = {
        "shallow_layer": cuts.shallow_layer,
        "deep_layer": cuts.deep_layer,
        "shallow_ratio": 0,
        "deep_ratio": 0,
    }
    llm = LLM(
        str(checkpoint),
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=256,
        max_num_batched_tokens=setting.batched_tokens,
        block_size=setting.block_size,
        kv_cache_memory_bytes=setting.kv_bytes,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,  # requests are alike, and shared blocks would count once
        additional_config={"himap": himap} if pruning else {},
        **setting.engine,
    )
    engine: Any = llm.llm_engine
    scheduler: Any = engine.engine_core.engine_core.scheduler
    kv_cache: Any = scheduler.kv_cache_config
    stage_layers = cuts.stage_layers(setting.num_layers)
    if pruning:
        groups = tuple(group_stages(kv_cache, stage_layers))
        ratios = {SHALLOW_ARG: cuts.ratios.shallow, DEEP_ARG: cuts.ratios.deep}
    else:
        groups = (0,) * len(kv_cache.kv_cache_groups)
        ratios = {}
    layers_per_block = max(len(group.layer_names) for group in kv_cache.kv_cache_groups)

    text = _text_tokens(cuts, setting)
    prompt = setting.image_tokens + text
    whole = prompt + setting.output_tokens - 1  # the last token is never computed
    left = cuts.stage_tokens(whole, setting.image_tokens) if pruning else (whole,) * NUM_STAGES
    tokens = tuple(int(t) for t in left)
    block = setting.block_size
    # A group with fewer layers than a block has room for takes whole blocks all the same.
    padding = layers_per_block if pruning else 1
    token_layers = sum(
        -(-t // block) * block * -(-n // padding) * padding
        for t, n in zip(tokens, stage_layers, strict=True)
    )
    expected = sum(blocks_per_request(tokens, groups, setting.block_size))
    pool = scheduler.kv_cache_manager.block_pool
    num_blocks = pool.get_num_free_blocks()
    peak_expected = num_blocks // expected

    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    params = SamplingParams(
        temperature=0, max_tokens=setting.output_tokens, ignore_eos=True, extra_args=ratios or None
    )
    # The tokenizer has a token per character, and puts <s> in front.
    content = {"prompt": "<image>" + "x" * (text - 1), "multi_modal_data": {"image": image}}
    for index in range(peak_expected + 4):
        engine.add_request(str(index), content, params)
    peak, blocks = 0, 0.0
    preempted: dict[str, int] = {}
    while engine.has_unfinished_requests():
        engine.step()
        running = scheduler.running
        # A prompt that waits for room in a step may already run, with the text before its image.
        if len(running) > peak and all(request.num_output_tokens for request in running):
            assert {request.num_prompt_tokens for request in running} == {prompt}
            peak = len(running)
            blocks = (num_blocks - pool.get_num_free_blocks()) / peak
        for request in (*running, *scheduler.waiting):
            preempted[request.request_id] = request.num_preemptions
    return Capacity(
        tokens=tokens,
        groups=groups,
        layers_per_block=layers_per_block,
        bytes_per_block=bytes_per_block(kv_cache),
        num_blocks=num_blocks,
        budget=setting.kv_bytes,
        blocks=blocks,
        blocks_expected=expected,
        kv_bytes_expected=setting.token_bytes * token_layers,
        peak=peak,
        peak_expected=peak_expected,
        preemptions=sum(preempted.values()),
        stats=llm.collective_rpc("himap_stats")[0] if pruning else None,
    )


def main() -> None:
    """Entry point of the engine's process."""
    parser = argparse.ArgumentParser(description="used by bench.serve")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--cuts", type=json.loads, required=True)
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--pruning", action="store_true")
    args = parser.parse_args()
    cuts = Cuts(**{**args.cuts, "ratios": Ratios(**args.cuts["ratios"])})
    capacity = _fill(args.checkpoint, cuts, args.pruning, Setting(**args.setting))
    args.answer.write_text(json.dumps(asdict(capacity)))


if __name__ == "__main__":
    main()
