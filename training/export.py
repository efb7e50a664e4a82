# SPDX-License-Identifier: Apache-2.0
"""Writes a model in the hub's layout: what vLLM, transformers and other tools load."""

from pathlib import Path

import torch
from himap_demo.scenes import SIZE
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .model import PATCH

HUB_NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
"""From transformers 5's module names to the hub's, which vLLM's loader knows."""


def hub_name(name: str) -> str:
    for ours, theirs in HUB_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours).removeprefix("vision_model.")
    raise ValueError(f"a weight of no known part: {name}")


def export(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Weights in bfloat16, configuration, tokenizer, chat template and processor, into a folder.

    The model itself stays as it is.
    """
    path.mkdir(parents=True, exist_ok=True)
    weights = {
        hub_name(name): value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIZE, "width": SIZE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)
