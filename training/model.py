# SPDX-License-Identifier: Apache-2.0
"""The model's shape, and its forward pass in training.

LLaVA: a CLIP vision tower whose second-to-last layer is read, a two-layer projector, a Llama
decoder. The decoder is deep and thin, so that most of its layers lie behind the layers that read
the image: what pruning saves grows with them.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from himap_demo.scenes import COLORS, GRID, SHAPES, SIZE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from .tokenizer import BOS, EOS, IMAGE, PAD, VOCABULARY

PATCH = 14
SIDE = SIZE // PATCH
IMAGE_TOKENS = SIDE * SIDE
VISION_WIDTH = 128
MATMUL = "matmul"
"""Name of the attention used in training."""
CHARACTERS = string.digits + string.ascii_lowercase
LABELS = {
    "color": 1 + len(COLORS),
    "shape": 2 + len(SHAPES),
    "first": 1 + len(CHARACTERS),
    "second": 1 + len(CHARACTERS),
    "third": 1 + len(CHARACTERS),
    "cell": GRID * GRID,
}
"""Labels of a patch in training, with the number of classes of each (0: no object, no text).

Those of the object that it shows, the characters of a card's whole text among them.
"""


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
    num_shared: int = 0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as two matrix products in bfloat16. [batch, heads, length, size] each.

    On CPUs at these lengths twice as fast, there and back, as PyTorch's fused kernel. The first
    `num_shared` rows see no key behind them, so those are not computed.
    """
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    length = query.shape[2]
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        query = query * scaling
        for rows, keys in ((slice(num_shared), num_shared), (slice(num_shared, length), length)):
            if keys == 0:
                continue
            scores = query[:, :, rows] @ key[:, :, :keys].transpose(-1, -2)
            if attention_mask is not None:
                scores = scores + attention_mask[:, :, rows, :keys]
            parts.append((scores.softmax(-1) @ value[:, :, :keys]).transpose(1, 2))
        return torch.cat(parts, 1), None


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


@dataclass(frozen=True)
class Cut:
    """What the layers from `layer` on do not have of the image.

    kept: numbers [batch, kept] among the image tokens that are left; all others are dropped.
    votes: without `kept`, each conversation has this many tokens for itself, those that its
        question's rows attend to the most in layer `layer - 1`. Other conversations about the same
        image keep others, so they are hidden instead of dropped.
    noise: of the logarithm of these votes, so that tokens nearby take turns.
    """

    layer: int
    kept: Tensor | None = None
    votes: int = 0
    noise: float = 0.0


def answer_logits(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    tokens: Tensor,
    positions: Tensor,
    segments: Tensor,
    voters: Tensor,
    cuts: Sequence[Cut] = (),
) -> Tensor:
    """Logits [batch, questions' tokens, vocabulary] of each token after the image's.

    tokens, positions, segments, voters: [batch, length]. Segment 0, the image's prompt, is seen by
    all; another segment is one conversation, which sees the image and itself, as if it were alone.
    voters: True at the rows of questions.
    """
    decoder = model.model.language_model
    image = model.model.multi_modal_projector(features)
    hidden = decoder.embed_tokens(tokens)
    at_image = (tokens == model.config.image_token_id)[..., None]
    rows = [hidden.masked_scatter(at_image, image.to(hidden.dtype)), positions, segments, voters]
    first = int(at_image[0, :, 0].nonzero()[0])
    left = image.shape[1]
    questions = tokens.shape[1] - int((segments[0] == 0).sum())
    mask, rotary = sees(segments), decoder.rotary_emb(rows[0], positions)
    planned = {cut.layer: cut for cut in cuts}
    for number, layer in enumerate(decoder.layers, 1):
        came = rows[0]
        rows[0] = layer(
            came,
            attention_mask=mask,
            position_ids=rows[1],
            position_embeddings=rotary,
            num_shared=came.shape[1] - questions,
        )
        cut = planned.get(number)
        if cut is None:
            continue
        if cut.kept is None:
            votes = attention_of(layer, came, rotary, mask, questions)
            segment, votes_too = (x[:, -questions:] for x in rows[2:])
            hides = _hidden_by_votes(votes[..., first : first + left], segment, votes_too, cut)
            mask = mask.clone()
            mask[:, 0, -questions:, first : first + left].masked_fill_(hides, float("-inf"))
        else:
            rows = _without(rows, cut.kept, first, left)
            left = cut.kept.shape[1]
            mask, rotary = sees(rows[2]), decoder.rotary_emb(rows[0], rows[1])
    # Also where no answer is: rows whose number changed from step to step would have oneDNN build
    # and keep kernels for each.
    logits: Tensor = model.lm_head(decoder.norm(rows[0])[:, -questions - 1 : -1])
    return logits


def _without(rows: Sequence[Tensor], kept: Tensor, first: int, left: int) -> list[Tensor]:
    """Of tensors [batch, length, ...], all rows but those of image tokens that are not kept."""
    numbers = torch.arange(rows[0].shape[1], device=kept.device).expand(len(kept), -1)
    going_on = torch.cat([numbers[:, :first], kept + first, numbers[:, first + left :]], 1)
    return [
        x.gather(
            1, going_on.view(*going_on.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        )
        for x in rows
    ]


@torch.no_grad()
def attention_of(
    layer: LlamaDecoderLayer, hidden: Tensor, rotary: Any, mask: Tensor, rows: int = 0
) -> Tensor:
    """[batch, rows, length]: what the last rows (0: all) attend to, the mean over the heads."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    scores = (query[:, :, -rows:] * attention.scaling) @ key.transpose(-1, -2)
    probabilities: Tensor = (scores + mask[:, :, -rows:]).float().softmax(-1)
    return probabilities.mean(1)


@torch.no_grad()
def _hidden_by_votes(attention: Tensor, segments: Tensor, voters: Tensor, cut: Cut) -> Tensor:
    """[batch, rows, image tokens]: True where a conversation does not keep a token.

    attention: [batch, rows, image tokens]; segments, voters: [batch, rows].
    """
    rows = one_hot(segments.clamp(min=0), int(segments.max()) + 1).float()
    votes = (rows * voters[..., None]).transpose(1, 2) @ attention
    noise = torch.randn_like(votes) * cut.noise
    kept = ((votes + 1e-9).log() + noise).topk(cut.votes, -1).indices
    hides = torch.ones_like(votes, dtype=torch.bool).scatter_(-1, kept, False)
    return hides.gather(1, segments.clamp(min=0)[..., None].expand(-1, -1, hides.shape[-1]))


def sees(segments: Tensor) -> Tensor:
    """[batch, 1, length, length]: 0 where a row sees a column, else -inf."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    seen = (((key == 0) | (key == query)) & causal)[:, None]
    return torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill_(~seen, float("-inf"))
