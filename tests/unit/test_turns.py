# SPDX-License-Identifier: Apache-2.0
"""Where the turns of a chat end: the marker in its template, and the units of a prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from himap_demo import MODEL_PATH
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor

from himap_vllm.config import EngineSettings
from himap_vllm.frontend.turns import common_opening, turn_marker
from himap_vllm.plan.prompt import ImageTokens
from himap_vllm.plan.turns import ends_of_images, ends_of_turns
from tests.checkpoints import build_llava

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
IDEFICS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Thoughts are left out of earlier turns.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>\n<|im_start|>assistant\n"),
    "thinking": (THINKING, "<|im_end|>\n<|im_start|>assistant\n"),
    "llama 3": (LLAMA3, "<|eot|><|head|>assistant<|/head|>\n\n"),
    "mistral": (MISTRAL, " [/INST]"),
    "idefics": (IDEFICS, "<end_of_utterance>\nAssistant:"),
    "nothing in common": ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_opens_a_turn(name: str) -> None:
    """With a tokenizer that merges signs: what is merged with the texts around is left out."""
    template, expected = TEMPLATES[name]
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_PATH)

    def ids(*messages: tuple[str, str], prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    def render(question: str, answer: str | None) -> Sequence[int]:
        user = ("user", question)
        if answer is None:
            return ids(user, prompt=True)
        return ids(user, ("assistant", answer), user)

    marker = common_opening(render)
    text = tokenizer.decode(marker)
    assert text in expected
    assert len(text) >= 0.7 * len(expected)
    if marker:  # it is found once for each answer of a chat
        chat = ids(("user", "A red one"), ("assistant", "So."), ("user", "Why not 12"), prompt=True)
        found = [i for i in range(len(chat)) if tuple(chat[i : i + len(marker)]) == marker]
        assert len(found) == 2


@pytest.mark.parametrize("model", ["bundled", "llava"])
def test_marker_of_a_model(tmp_path: Path, model: str) -> None:
    path = MODEL_PATH
    if model == "llava":
        path = tmp_path / model
        build_llava(path, image_size=56, patch_size=14, num_layers=4, num_heads=4, num_kv_heads=4)
    config = EngineArgs(model=str(path), max_model_len=512, dtype="float32").create_engine_config()
    processor = InputProcessor(config)
    tokenizer: Any = processor.renderer.tokenizer
    found = turn_marker(processor, EngineSettings())
    assert tokenizer.decode(list(found)) == " ASSISTANT:"
    assert turn_marker(processor, EngineSettings(turn_marker=(5, 6))) == (5, 6)
    by_text = turn_marker(processor, EngineSettings(turn_marker="ASSISTANT:"))
    assert tokenizer.decode(list(by_text)) == "ASSISTANT:"
    processor.renderer.tokenizer = None  # skip_tokenizer_init
    assert turn_marker(processor, EngineSettings()) == ()


def test_ends_against_plain_search() -> None:
    rng = random.Random(0)
    several = 0
    for _ in range(500):
        marker = [1, 2, 1][: rng.randrange(1, 4)]
        tokens: list[int] = []
        images: list[ImageTokens] = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.3:
                begin = len(tokens)
                tokens += [0] * rng.randrange(1, 5)
                images.append(ImageTokens(((begin, len(tokens)),)))
            else:
                tokens += rng.choice([marker, [1, 2], [3], [1]])
        expected = []
        for image in images:
            behind = (i for i in range(image.last + 1, len(tokens)))
            ends = (i + len(marker) for i in behind if tokens[i : i + len(marker)] == marker)
            expected.append(next(ends, len(tokens)))
        assert ends_of_turns(tokens, images, marker) == expected
        assert ends_of_turns(tokens, images, ()) == [len(tokens)] * len(images)
        assert ends_of_images(images) == [image.last + 1 for image in images]
        several += len(set(expected)) > 1
    assert several > 50
