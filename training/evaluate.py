# SPDX-License-Identifier: Apache-2.0
"""Held-out accuracy per kind with plain transformers: `python -m training.evaluate MODEL`.

A quick look at a checkpoint, without vLLM and without pruning. What is published is measured
through the HTTP API by `himap eval`.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from himap_demo.heldout import items
from himap_demo.questions import KINDS
from PIL.Image import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

MAX_TOKENS = 64


class Asked(Protocol):
    """A question about an image."""

    @property
    def image(self) -> Image: ...

    @property
    def question(self) -> str: ...


AnyAsked = TypeVar("AnyAsked", bound=Asked)


def predict(
    path: Path, questions: Iterable[AnyAsked], batch: int = 32
) -> Iterator[tuple[AnyAsked, str]]:
    """Each question with the model's answer (greedy), in order. Pads the prompts on the left."""
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    questions = iter(questions)
    while group := list(islice(questions, batch)):
        prompts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": item.question}],
                    }
                ]
            )
            for item in group
        ]
        inputs = processor(
            images=[item.image for item in group],
            text=prompts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        said = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        yield from zip(group, (text.strip() for text in said), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--questions", type=int, default=2, help="per scene")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to print")
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for item, said in predict(args.model, items(args.scenes, args.questions)):
        asked[item.kind] += 1
        right[item.kind] += said in item.answers
        if said not in item.answers and args.wrong > 0:
            args.wrong -= 1
            print(f"{item.question}\n    said {said!r}, accepted {item.answers}")
    for kind in KINDS:
        if asked[kind]:
            print(f"{kind:8} {right[kind] / asked[kind]:6.1%}  of {asked[kind]}")
    print(f"{'all':8} {right.total() / asked.total():6.1%}  of {asked.total()}")


if __name__ == "__main__":
    main()
