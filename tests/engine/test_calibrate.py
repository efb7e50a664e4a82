# SPDX-License-Identifier: Apache-2.0
"""`himap calibrate` against attention computed the plain way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from himap_eval import calibrate
from transformers import DynamicCache

from tests.engine.test_oracle import PICTURES
from tests.engines import DEEP_LAYER, SHALLOW_LAYER
from tests.oracle import Oracle
from tests.world import World

QUESTIONS = ("What is this?", "Where is it, and why?", "Who?")


@torch.inference_mode()
def attention_by_place(oracle: Oracle, prompt: str, picture: int) -> dict[int, np.ndarray]:
    """By cut: [num_image_tokens] attention of the text behind the image, relative to its mean."""
    ids, vision = oracle._process(prompt, [PICTURES[picture]])
    start = oracle._embed(ids, vision)
    places = [p for p, token in enumerate(ids) if token == oracle.image_token]
    hidden, cache, found = start.hidden, DynamicCache(), {}
    for layer in range(DEEP_LAYER):
        hidden, attention = oracle._layer(layer, hidden, start.positions, cache)
        votes = attention[places[-1] + 1 :][:, places].sum(0)
        found[layer + 1] = (votes / votes.mean()).numpy()
    return found


def test_the_mean_of_a_users_questions(world: World, tmp_path: Path) -> None:
    lines = []
    for number, question in enumerate(QUESTIONS):
        PICTURES[number].save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": question, "answers": "any"})
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "prior.json"
    checkpoint = world.checkpoint("mha12")
    options = "--dtype float32 --enforce-eager --max-model-len 512 --kv-cache-memory-bytes 64M"
    status = calibrate.main([
        str(checkpoint), "--layers", f"{SHALLOW_LAYER},{DEEP_LAYER}", "--data", str(data),
        "--output", str(output), "--", *options.split(),
    ])  # fmt: skip
    assert status == 0
    layers = json.loads(output.read_text())["layers"]
    oracle = Oracle(checkpoint, SHALLOW_LAYER, DEEP_LAYER)
    tokenizer = oracle.processor.tokenizer
    expected = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected.append(attention_by_place(oracle, prompt.removeprefix("<s>"), number))
    assert sorted(map(int, layers)) == [SHALLOW_LAYER, DEEP_LAYER]
    for layer, values in layers.items():
        mean = np.mean([found[int(layer)] for found in expected], axis=0)
        assert values == pytest.approx(mean.tolist(), abs=1e-3)
    assert max(layers[str(DEEP_LAYER)]) > 1.01  # attention is not flat
