# SPDX-License-Identifier: Apache-2.0
"""LoRA on the decoder: every surviving row takes the adapter of its request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import sample_images
from tests.engines import WARM, Case, Engine
from tests.world import World, assert_equals_oracle

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PICTURES = tuple(sample_images(6, seed=7))
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"
TWO = "USER: <image>\n<image>\nCompare. ASSISTANT:"
ADAPTERS = (None, "first", "second")
# A slot more than adapters: vLLM's CPU kernels give rows without an adapter the last slot's
# (https://github.com/vllm-project/vllm/pull/48421), and an empty one adds nothing.
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def build_adapter(base: Path, adapter: Path, merged: Path, seed: int) -> None:
    """Write a random adapter as PEFT does, and `base` with the adapter merged into its weights."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name.startswith("language_model.model.layers") and module.endswith(TARGETS):
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(len(weight), RANK, generator=generator) * 0.3 * weight.std()
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            weights[name] = weight + ALPHA / RANK * up @ down
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.mkdir()
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (merged / file.name).symlink_to(file)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


def lora_requests(world: World) -> dict[str | None, Any]:
    """vLLM's requests for `ADAPTERS`; `world` knows the merged checkpoints by the same names."""
    from vllm.lora.request import LoRARequest

    base = world.checkpoint("mha12")
    requests: dict[str | None, Any] = {None: None}
    for number, name in enumerate(ADAPTERS[1:], 1):
        assert name is not None
        adapter = base.parent / f"{name}-adapter"
        if not adapter.exists():
            build_adapter(base, adapter, base.parent / name, seed=number)
        requests[name] = LoRARequest(name, number, str(adapter))
    return requests


def generate(engine: Engine, cases: list[Case], adapters: list[Any]) -> list[Any]:
    """One batch, each case with its adapter."""
    outputs: list[Any] = engine.llm.generate(
        [engine.prompt(case) for case in cases],
        [engine.params(case) for case in cases],
        lora_request=adapters,
        use_tqdm=False,
    )
    return outputs


def test_a_mixed_batch_equals_the_oracle_on_merged_weights(world: World) -> None:
    adapters = lora_requests(world)
    cases, names = [], []
    for i, ratios in enumerate([(0.5, 0.75), (0, 0), (0.25, 0.5), (0.75, 0.25)]):
        for k, name in enumerate(ADAPTERS):
            prompt, count = ((QUESTION, 1), (TWO, 2))[(i + k) % 2]
            cases.append(Case(prompt, PICTURES[i : i + count], ratios, max_tokens=3))
            names.append(name)
        cases.append(Case(f"Only {i} words. Go on:", (), max_tokens=3))
        names.append(ADAPTERS[i % 3])
    engine = world.engine(**LORA)
    outputs = generate(engine, cases, [adapters[name] for name in names])
    for case, name, output in zip(cases, names, outputs, strict=True):
        expected = world.oracle(name or "mha12", case)
        assert min(expected.margin, expected.score_margin) > 1e-5  # no tie within rounding
        assert_equals_oracle(world, engine, name or "mha12", case, output)
    # The adapters matter to what survives.
    ids = [output.request_id for output in outputs[:3]]
    assert len({repr(engine.trace(request_id)) for request_id in ids}) == 3


def test_the_prefix_cache_keeps_adapters_apart(world: World) -> None:
    """The same prompt with each adapter, then again."""
    adapters = lora_requests(world)
    engine = world.engine(**LORA)
    engine.llm.reset_prefix_cache()
    case = Case(
        f"{'Few words before the picture. ' * 6}{QUESTION}", PICTURES[:1], (0.5, 0.75), params=WARM
    )
    found = []
    for name in (*ADAPTERS, *ADAPTERS):
        (output,) = generate(engine, [case], [adapters[name]])
        assert_equals_oracle(world, engine, name or "mha12", case, output)
        found.append(output.num_cached_tokens)
    again = len(output.prompt_token_ids) - 1
    assert found == [0, 0, 0, again, again, again]


def test_ratio_zero_equals_stock(world: World) -> None:
    adapters = lora_requests(world)
    cases = [Case(QUESTION, PICTURES[:1], (0, 0), max_tokens=20) for _ in ADAPTERS]
    cases.append(Case("No picture at all. Go on:", (), max_tokens=20))
    requests = [*(adapters[name] for name in ADAPTERS), adapters["first"]]
    answers = [
        [list(output.outputs[0].token_ids) for output in generate(engine, cases, requests)]
        for engine in (world.engine(**LORA), world.stock(**LORA))
    ]
    assert answers[0] == answers[1]
    assert len({repr(tokens) for tokens in answers[0][:3]}) == 3
