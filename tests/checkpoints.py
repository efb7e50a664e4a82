# SPDX-License-Identifier: Apache-2.0
"""Random-weight checkpoints in the hub's layout (LLaVA-1.5 here), and pictures to show them."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(4)
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
NUM_VISIBLE = 94  # "!" to "~", the first entries after the specials; see `make_tokenizer`
GAINS = {"q_proj": 1.8, "k_proj": 1.8, "o_proj": 1.5, "down_proj": 0.7, "linear_2": 1.1}
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128)  # what vLLM's CPU attention kernels accept

# Content is looped over in place, which is how vLLM tells that list content is wanted; the parts
# keep the order of the request, so tests can put text before, between and after the images.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif 'image' in part['type'] %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_llava(
    path: Path,
    *,
    num_layers: int = 12,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    image_size: int = 56,
    patch_size: int = 14,
    vision_layers: int = 3,
    vision_hidden_size: int = 32,
    vision_heads: int = 2,
    vision_intermediate_size: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int = 4096,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weights: bool = True,
) -> Path:
    """Write a checkpoint to the directory `path` (created) and return it.

    An image becomes `(image_size // patch_size) ** 2` tokens. Equal arguments give equal files. The
    weights are random but scaled for testing: see `_fill`. Without `weights` the checkpoint is for
    `--load-format dummy`.
    """
    tokenizer = make_tokenizer()
    text = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size or len(tokenizer),
        max_position_embeddings=max_position_embeddings,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=vision_intermediate_size or 2 * vision_hidden_size,
        projection_dim=vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    config = _llava_config(text, vision, dtype)
    path.mkdir(parents=True, exist_ok=True)
    if weights:
        with torch.device("meta"):  # for its names and shapes
            model = LlavaForConditionalGeneration(config)
        save_weights(path, model, len(SPECIALS), dtype, seed, rename=_hub_name)
    save_config(path, config)
    _llava_processor(tokenizer, image_size, patch_size).save_pretrained(path)
    return path


def _llava_config(text: LlamaConfig, vision: CLIPVisionConfig, dtype: torch.dtype) -> LlavaConfig:
    if text.head_dim not in CPU_HEAD_DIMS:
        raise ValueError(f"head_dim {text.head_dim} is not one of {CPU_HEAD_DIMS}")
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )


def _llava_processor(
    tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int
) -> LlavaProcessor:
    side = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=side,
            crop_size=side,
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        chat_template=CHAT_TEMPLATE,
    )


def save_config(path: Path, config: PreTrainedConfig) -> None:
    """Write what is not weights, tokenizer or processor."""
    config.save_pretrained(path)
    ids = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (path / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def save_weights(
    path: Path,
    model: PreTrainedModel,
    num_specials: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rename: Callable[[str], str] = str,
) -> None:
    """Write random weights for `model`, which may be on the meta device.

    Args:
        path: of the checkpoint.
        model: gives names and shapes.
        num_specials: special tokens in the vocabulary's beginning.
        dtype: of the file.
        seed: of the weights.
        rename: from the names of transformers to the hub's.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    weights: dict[str, torch.Tensor] = {}
    for name, empty in model.state_dict().items():
        name = rename(name)
        # One generator per tensor: a weight depends on its name and not on what precedes it.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        weight = torch.randn(empty.shape, generator=generator)
        weights[name] = _fill(name, weight, num_layers, num_specials).to(dtype).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def sample_images(n: int, seed: int = 0, size: int = 64) -> list[Image.Image]:
    """Return `n` RGB pictures, `size` x `size`, of coloured shapes on a coloured slope."""
    images = []
    for index in range(n):
        rng = random.Random(1000 * seed + index)
        start, end = ([rng.randrange(256) for _ in range(3)] for _ in range(2))
        slope = Image.linear_gradient("L").rotate(90 * rng.randrange(4)).resize((size, size))
        image = Image.composite(
            Image.new("RGB", (size, size), tuple(start)),
            Image.new("RGB", (size, size), tuple(end)),
            slope,
        )
        draw = ImageDraw.Draw(image)
        for _ in range(10):
            colour = tuple(rng.randrange(256) for _ in range(3))
            x, y = rng.randrange(size), rng.randrange(size)
            w, h = (rng.randrange(size // 8, size // 2) for _ in range(2))
            shape = rng.choice(("ellipse", "rectangle", "polygon"))
            if shape == "polygon":
                draw.polygon([(x, y), (x + w, y), (x + w // 2, y - h)], fill=colour)
            else:
                getattr(draw, shape)((x - w // 2, y - h // 2, x + w // 2, y + h // 2), fill=colour)
        images.append(image)
    return images


def make_tokenizer(specials: Sequence[str] = SPECIALS, **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the specials and one entry per byte, which adds `<s>`.

    The first three specials are always pad, begin and end; `named` ones become attributes.
    """
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # No merges: the tokens of a text are then the same whatever stands beside it.
    core = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=named,
    )


def _hub_name(name: str) -> str:
    """Translate a transformers 5 weight name to the one that the hub's LLaVA-1.5 files use."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    part, rest = name.split(".", 1)
    inner = {"vision_tower": "vision_model.", "language_model": "model."}.get(part, "")
    return f"{part}.{inner}{rest.removeprefix(inner)}"


def _fill(name: str, noise: torch.Tensor, num_layers: int, num_specials: int) -> torch.Tensor:
    """Scale `noise`, which is standard normal, into the weight called `name`.

    Matrices keep the mean square of their input but for a gain by kind. Queries and keys are
    large, so that attention is uneven. What a decoder layer adds to the residual stream is small
    in proportion to the depth, so that rounding differences do not grow from layer to layer.
    """
    if name.endswith(".bias"):
        return 0.1 * noise
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if noise.ndim > 2:  # the convolution over an image's patches
        return 2.0 * noise / math.sqrt(noise[0].numel())
    if "embed" in name or "newline" in name:
        return noise * (0.5 if "pos" in name else 1.0)
    if noise.ndim == 1:  # a scale
        return 1.0 + 0.1 * noise
    unit = noise / math.sqrt(noise.shape[-1])
    if name.endswith("lm_head.weight"):
        # Answers are visible ASCII and, rarely, the end: such tokens and their text are one to one.
        scale = torch.full((len(noise), 1), 0.5)
        scale[num_specials : num_specials + NUM_VISIBLE] = 5.0
        scale[EOS_ID] = 4.0
        return unit * scale
    kind = name.split(".")[-2]
    if kind in ("o_proj", "down_proj"):
        return unit * GAINS[kind] / math.sqrt(2 * num_layers)
    return unit * GAINS.get(kind, 1.0)
