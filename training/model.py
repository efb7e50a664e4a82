# SPDX-License-Identifier: Apache-2.0
"""The model's shape, and its forward pass in training.

LLaVA: a CLIP vision tower whose second-to-last layer is read, a two-layer projector, a Llama
decoder. The decoder is deep and thin, so that most of its layers lie behind the layers that read
the image: what pruning saves grows with them.
"""

import torch
from himap_demo.scenes import COLORS, GRID, SHAPES, SIZE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .tokenizer import BOS, EOS, IMAGE, PAD, VOCABULARY

PATCH = 14
SIDE = SIZE // PATCH
IMAGE_TOKENS = SIDE * SIDE
VISION_WIDTH = 128
MATMUL = "matmul"
"""Name of the attention used in training."""
LABELS = {"color": 1 + len(COLORS), "shape": 2 + len(SHAPES), "digit": 11, "cell": GRID * GRID}
"""Labels of a patch in training, with the number of classes of each (0: no object, no digit)."""


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, BOS, EOS, IMAGE)}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
            tie_word_embeddings=True,
            rope_theta=10000.0,
        ),
        image_token_index=ids[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


class PatchHeads(nn.Module):
    """What object a patch shows and where it lies, read from the tower's features by one layer.

    Only in training: it makes the features say in every patch of an object what the object is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(VISION_WIDTH)
        self.heads = nn.ModuleDict({k: nn.Linear(VISION_WIDTH, n) for k, n in LABELS.items()})

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss. features: [batch, patches, width]; labels: [batch, len(LABELS), patches].

        Most patches show no object: they weigh less.
        """
        features = self.norm(features.float()).flatten(0, 1)
        loss = features.new_zeros(())
        for i, (key, head) in enumerate(self.heads.items()):
            weight = torch.ones(LABELS[key], device=features.device)
            if key != "cell":
                weight[0] = 0.15
            loss = loss + cross_entropy(head(features), labels[:, i].flatten(), weight)
        return loss


def matmul_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as two matrix products in bfloat16. [batch, heads, length, size] each.

    On CPUs at these lengths twice as fast, there and back, as PyTorch's fused kernel.
    """
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = (query * scaling) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(MATMUL, matmul_attention)


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's features [batch, patches, width] of pixels [batch, 3, SIZE, SIZE].

    Up to the layer that is read (`vision_feature_layer`), without the class token.
    """
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        hidden = layer(hidden, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    patches: torch.Tensor = hidden[:, 1:]
    return patches


def answer_logits(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    tokens: Tensor,
    positions: Tensor,
    segments: Tensor,
) -> Tensor:
    """Logits [batch, questions' tokens, vocabulary] of each token after the image's.

    tokens, positions, segments: [batch, length]. Segment 0, the image, is seen by all;
    another segment is one question, which sees the image and itself, as if it were asked alone.
    """
    image = model.model.multi_modal_projector(features)
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(tokens)
    at_image = (tokens == model.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(at_image, image.to(hidden.dtype))
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    seen = (((key == 0) | (key == query)) & causal)[:, None]
    mask = torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill_(~seen, float("-inf"))
    hidden = decoder(
        inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    # Also where no answer is: rows whose number changed from step to step would have oneDNN build
    # and keep kernels for each.
    questions = int((segments[0] == 0).sum())
    logits: torch.Tensor = model.lm_head(hidden[:, questions - 1 : -1])
    return logits
