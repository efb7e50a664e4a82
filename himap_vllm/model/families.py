# SPDX-License-Identifier: Apache-2.0
"""Model families that can be pruned: what the plugin must know about each.

The table does not say what an image token is: vLLM's placeholder positions do, for every model.
docs/adding-a-model.md explains how to add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ADDING_A_MODEL = "docs/adding-a-model.md"


@dataclass(frozen=True, slots=True)
class Family:
    """A vision-language architecture.

    Attributes:
        architecture: name in the checkpoint's `architectures`.
        models: names that people know.
        decoders: `model_type` of the text configs whose decoder has the form that
            `himap_vllm.model.segmented_decoder` needs.
        decoder: the decoder inside a loaded vLLM model of this architecture.
        first_cut: least K1, from the checkpoint's configuration.
    """

    architecture: str
    models: str
    decoders: tuple[str, ...]
    decoder: Callable[[Any], Any] = lambda model: model.language_model.model
    first_cut: Callable[[Any], int] = lambda _config: 1


def _idefics3_decoder(model: Any) -> Any:
    return model.model.text_model


def _after_deepstack(config: Any) -> int:
    # vLLM configures the decoder by itself once more, without the vision tower.
    vision = getattr(config, "vision_config", None)
    return max(1, len(vision.deepstack_visual_indexes)) if vision else 1


_TEXT = ("llama", "mistral", "qwen2", "qwen3")

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlavaForConditionalGeneration", "LLaVA-1.5, Pixtral (transformers)", _TEXT),
        Family("LlavaNextForConditionalGeneration", "LLaVA-NeXT (1.6)", _TEXT),
        Family("LlavaOnevisionForConditionalGeneration", "LLaVA-OneVision", _TEXT),
        Family("Qwen2VLForConditionalGeneration", "Qwen2-VL", ("qwen2_vl_text",)),
        Family("Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL", ("qwen2_5_vl_text",)),
        Family(
            "Qwen3VLForConditionalGeneration",
            "Qwen3-VL",
            ("qwen3_vl_text",),
            first_cut=_after_deepstack,
        ),
        Family("Mistral3ForConditionalGeneration", "Mistral Small 3.1", ("mistral",)),
        Family("InternVLForConditionalGeneration", "InternVL3, 3.5 (transformers)", _TEXT),
        Family(
            "Idefics3ForConditionalGeneration", "Idefics3", ("llama",), decoder=_idefics3_decoder
        ),
        Family("SmolVLMForConditionalGeneration", "SmolVLM", ("llama",), decoder=_idefics3_decoder),
    )
}

REFUSED: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "the tokens of an image attend to each other in both "
    "directions, and most layers see a sliding window of the sequence, which the arithmetic of a "
    "pruned sequence does not cover",
}
