# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight checkpoints of every supported family: real architecture, real processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.checkpoints import (
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    PAD_ID,
    make_tokenizer,
    save_config,
    save_weights,
)

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS = 64, 2, 1, 10
PLAIN = ("<pad>", "<s>", "</s>")
NORMALIZED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


@dataclass(frozen=True)
class Tiny:
    """A family's checkpoint.

    Attributes:
        build: writes it to a folder that exists.
        image: what stands for an image in a prompt.
    """

    build: Callable[[Path], None]
    image: str = "<image>"


def text_config(specials: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A decoder's configuration, the same for all."""
    return {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HIDDEN_SIZE // NUM_HEADS,
        "vocab_size": len(make_tokenizer(specials)),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **IDS,
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    """A vision tower's configuration, in the words that most have in common."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        **more,
    }


def save(
    path: Path,
    config: hf.PreTrainedConfig,
    processor: hf.ProcessorMixin,
    num_specials: int,
    rename: Callable[[str], str] = str,
) -> None:
    """Write a checkpoint."""
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    save_weights(path, model, num_specials, rename=rename)
    save_config(path, config)
    processor.save_pretrained(path)


def tower_name(name: str) -> str:
    """The hub's name of a weight of CLIP or SigLIP; vLLM's towers know no other."""
    inner = "model.vision_tower."
    return name.replace(inner, f"{inner}vision_model.") if name.startswith(inner) else name


def llava_next(path: Path) -> None:
    """LLaVA-NeXT: an image in tiles, and as a whole."""
    specials = (*PLAIN, "<image>")
    grid = [[56, 112], [112, 56], [112, 112]]
    config = hf.LlavaNextConfig(
        text_config=hf.MistralConfig(**text_config(specials), sliding_window=None),
        vision_config=hf.CLIPVisionConfig(**tower(), projection_dim=32),
        image_token_index=specials.index("<image>"),
        image_grid_pinpoints=grid,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=grid,
            **NORMALIZED,
        ),
        tokenizer=make_tokenizer(specials),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    save(path, config, processor, len(specials), tower_name)


def llava_onevision(path: Path) -> None:
    """LLaVA-OneVision: tiles, SigLIP, Qwen2."""
    specials = (*PLAIN, "<image>", "<video>")
    grid = [[56, 112], [112, 56], [112, 112]]
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**text_config(specials)),
        vision_config=hf.SiglipVisionConfig(**tower(), vision_use_head=False),
        image_token_index=specials.index("<image>"),
        video_token_index=specials.index("<video>"),
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=grid, **NORMALIZED
        ),
        tokenizer=make_tokenizer(specials),
        video_processor=hf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    save(path, config, processor, len(specials), tower_name)


QWEN = (*PLAIN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IDS = {
    "vision_start_token_id": QWEN.index("<|vision_start|>"),
    "vision_end_token_id": QWEN.index("<|vision_end|>"),
    "image_token_id": QWEN.index("<|image_pad|>"),
    "video_token_id": QWEN.index("<|video_pad|>"),
}
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>", QWEN_IMAGE)


def mrope(section: list[int], **more: Any) -> dict[str, Any]:
    """Multi-dimensional rotary positions."""
    return {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0, **more}


def save_qwen(
    path: Path,
    config: hf.PreTrainedConfig,
    processor: Callable[..., hf.ProcessorMixin],
    video: Any,
    *,
    patch_size: int,
) -> None:
    """Save a checkpoint whose processor makes 4 to 36 tokens of an image."""
    side = 2 * patch_size
    images = hf.Qwen2VLImageProcessor(
        patch_size=patch_size,
        size={"shortest_edge": 4 * side * side, "longest_edge": 36 * side * side},
        **NORMALIZED,
    )
    tokenizer = make_tokenizer(QWEN)
    made = processor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=QWEN_TEMPLATE,
    )
    save(path, config, made, len(QWEN))


def qwen2_vl(path: Path) -> None:
    """Qwen2-VL: M-RoPE, any resolution."""
    config = hf.Qwen2VLConfig(
        text_config=text_config(QWEN, rope_parameters=mrope([4, 6, 6])),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "hidden_size": HIDDEN_SIZE,
        },
        tie_word_embeddings=False,
        **QWEN_IDS,
    )
    save_qwen(path, config, hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor(), patch_size=14)


def qwen2_5_vl(path: Path) -> None:
    """Qwen2.5-VL: window attention in the tower."""
    config = hf.Qwen2_5_VLConfig(
        text_config=text_config(QWEN, rope_parameters=mrope([4, 6, 6])),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN_SIZE,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **QWEN_IDS,
    )
    save_qwen(path, config, hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor(), patch_size=14)


def qwen3_vl(path: Path) -> None:
    """Qwen3-VL: interleaved M-RoPE, deepstack in the first two layers."""
    config = hf.Qwen3VLConfig(
        text_config=text_config(QWEN, rope_parameters=mrope([6, 5, 5], mrope_interleaved=True)),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN_SIZE,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **QWEN_IDS,
    )
    save_qwen(path, config, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor(), patch_size=16)


def internvl(path: Path, text: type[hf.PreTrainedConfig] = hf.Qwen2Config) -> None:
    """InternVL3 (3.5: Qwen3) in transformers' own form: tiles, and a thumbnail."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = (*PLAIN, *named.values())
    config = hf.InternVLConfig(
        text_config=text(**text_config(specials)),
        vision_config=hf.InternVLVisionConfig(
            **tower(image_size=[56, 56], patch_size=[14, 14]), layer_scale_init_value=0.1
        ),
        image_token_id=specials.index("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(
            size={"height": 56, "width": 56},
            crop_to_patches=True,
            min_patches=1,
            max_patches=6,
            **NORMALIZED,
        ),
        tokenizer=make_tokenizer(specials, **named),
        video_processor=hf.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )
    save(path, config, processor, len(specials))


def _idefics_specials() -> tuple[str, ...]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    around = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    return (*PLAIN, *around, *tiles)


def _idefics(
    path: Path,
    config: type[hf.PreTrainedConfig],
    processor: type[hf.ProcessorMixin],
    **processors: Any,
) -> None:
    specials = _idefics_specials()
    made = config(
        text_config=hf.LlamaConfig(**text_config(specials)),
        vision_config=tower(),
        image_token_id=specials.index("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
    )
    save(
        path,
        made,
        processor(
            tokenizer=make_tokenizer(specials),
            image_seq_len=4,
            chat_template=CHAT_TEMPLATE,
            **processors,
        ),
        len(specials),
    )


_IDEFICS_SIZES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}


def idefics3(path: Path) -> None:
    """Idefics3: tiles, each with text before it."""
    images = hf.Idefics3ImageProcessor(**_IDEFICS_SIZES, **NORMALIZED)
    _idefics(path, hf.Idefics3Config, hf.Idefics3Processor, image_processor=images)


def smolvlm(path: Path) -> None:
    """SmolVLM: as Idefics3."""
    images = hf.SmolVLMImageProcessor(**_IDEFICS_SIZES, **NORMALIZED)
    videos = hf.SmolVLMVideoProcessor(**_IDEFICS_SIZES)
    processors = {"image_processor": images, "video_processor": videos}
    _idefics(path, hf.SmolVLMConfig, hf.SmolVLMProcessor, **processors)


def pixtral(path: Path) -> None:
    """Pixtral in transformers' form: any resolution, a break after each row."""
    specials = (*PLAIN, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = hf.LlavaConfig(
        text_config=hf.MistralConfig(**text_config(specials), sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**tower(image_size=112, patch_size=16)),
        image_token_index=specials.index("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    processor = hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(
            size={"longest_edge": 112}, patch_size={"height": 16, "width": 16}, **NORMALIZED
        ),
        tokenizer=make_tokenizer(specials),
        patch_size=16,
        chat_template=CHAT_TEMPLATE.replace("<image>", "[IMG]"),
    )
    save(path, config, processor, len(specials))


def mistral3(path: Path) -> None:
    """Mistral Small 3.1: Pixtral's tower, four patches to a token."""
    specials = (*PLAIN, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**text_config(specials), sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**tower(image_size=112, patch_size=14)),
        image_token_index=specials.index("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(
            size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}, **NORMALIZED
        ),
        tokenizer=make_tokenizer(specials),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE.replace("<image>", "[IMG]"),
    )
    save(path, config, processor, len(specials))


TINY: dict[str, Tiny] = {
    "llava-next": Tiny(llava_next),
    "llava-onevision": Tiny(llava_onevision),
    "qwen2-vl": Tiny(qwen2_vl, QWEN_IMAGE),
    "qwen2.5-vl": Tiny(qwen2_5_vl, QWEN_IMAGE),
    "qwen3-vl": Tiny(qwen3_vl, QWEN_IMAGE),
    "internvl": Tiny(internvl, "<IMG_CONTEXT>"),
    "internvl-qwen3": Tiny(partial(internvl, text=hf.Qwen3Config), "<IMG_CONTEXT>"),
    "idefics3": Tiny(idefics3),
    "smolvlm": Tiny(smolvlm),
    "pixtral": Tiny(pixtral, "[IMG]"),
    "mistral3": Tiny(mistral3, "[IMG]"),
}

# A test for each; with several workers, those of a family run on the same one.
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TINY]
)
