# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer for one prompt: what it adds up to, and what is left if a flow is blocked.

HiMAP (CVPR 2025), section 2.2: a prompt's tokens are of the system prompt (before the first image),
of an image, or of the instruction (text behind it). Tokens between the image tokens of one image,
line breaks for example, are of a class of their own, `MARK`.

Rows of an attention map are computed in parts, so that a whole map never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SYSTEM, IMAGE, TEXT, MARK = CLASSES = range(4)

# Bounds the probabilities held at once: heads * rows * keys, in float32.
_MAX_PROBABILITIES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LayerFlows:
    """Sums over one attention map, the mean over heads, in float32.

    Attributes:
        mass: [4, 4] attention that the rows of a class pay to the tokens of a class.
        from_text: [num_image_tokens] attention that each image token gets from rows of the
            instruction: the paper's Eq. 8.
        from_image: [num_image_tokens] attention that it gets from rows of images: Eq. 9, as the
            paper's text and code have it.
        entropy: [4] in nats, mean over heads and rows of a class; NaN without rows.
    """

    mass: torch.Tensor
    from_text: torch.Tensor
    from_image: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """A flow to cut off.

    Attributes:
        readers: classes whose rows no longer attend to image tokens.
        renormalized: whether what is left adds up to one again, as if the image tokens were
            dropped. The paper sets attention to zero, and leaves it at that.
    """

    readers: tuple[int, ...]
    renormalized: bool = False


IMAGE_TO_TEXT = Block((TEXT,))
IMAGE_TO_IMAGE = Block((IMAGE,))
DROPPED = Block((TEXT, MARK), renormalized=True)
"""From here on nothing but image tokens reads image tokens, so that they no longer matter."""


def layer_flows(
    query: torch.Tensor, key: torch.Tensor, scale: float, classes: torch.Tensor
) -> LayerFlows:
    """Sum up the causal attention of a prompt.

    Args:
        query: [num_tokens, num_heads, head_size], rotary applied.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        scale: softmax scale.
        classes: [num_tokens] class of each token.
    """
    one_hot = torch.nn.functional.one_hot(classes, len(CLASSES)).float()
    image = classes == IMAGE
    mass = one_hot.new_zeros(len(CLASSES), len(CLASSES))
    received = one_hot.new_zeros(len(CLASSES), int(image.sum()))
    entropy = one_hot.new_zeros(len(CLASSES))
    for rows, logits in _logits(query, key, scale, torch.arange(len(query), device=query.device)):
        attention = logits.softmax(-1)
        mean = attention.mean((0, 1))
        readers = one_hot[rows].T
        mass += readers @ mean @ one_hot
        received += readers @ mean[:, image]
        entropy += readers @ torch.special.entr(attention).sum(-1).mean((0, 1))
    return LayerFlows(mass, received[TEXT], received[IMAGE], entropy / one_hot.sum(0))


def blocked_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    classes: torch.Tensor,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output of causal attention with a flow blocked, where it differs.

    Args:
        query: [num_tokens, num_heads, head_size], rotary applied.
        key: [num_tokens, num_kv_heads, head_size], likewise.
        value: [num_tokens, num_kv_heads, head_size].
        scale: softmax scale.
        classes: [num_tokens] class of each token.
        block: the flow.

    Returns:
        [num_rows] int64, rows whose attention is blocked, and their [num_rows, num_heads,
        head_size] output in float32.
    """
    reads = torch.isin(classes, torch.tensor(block.readers, device=classes.device))
    # Rows before the first image see none of it.
    reads &= (classes == IMAGE).cumsum(0) > 0
    all_rows = reads.nonzero().squeeze(-1)
    image = classes == IMAGE
    values = value.float().permute(1, 0, 2).unsqueeze(1)  # [kv_heads, 1, keys, head_size]
    parts = [query.new_empty(0, *query.shape[1:], dtype=torch.float32)]
    for _, logits in _logits(query, key, scale, all_rows):
        if block.renormalized:
            logits = logits.masked_fill(image, float("-inf"))
        attention = logits.softmax(-1)
        if not block.renormalized:
            attention = attention.masked_fill(image, 0.0)
        parts.append((attention @ values).permute(2, 0, 1, 3).flatten(1, 2))
    return all_rows, torch.cat(parts)


def _logits(
    query: torch.Tensor, key: torch.Tensor, scale: float, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of `rows`, each with its logits [num_kv_heads, queries per key, rows, num_tokens]."""
    num_tokens, num_heads, head_size = query.shape
    grouped = query.reshape(num_tokens, key.shape[1], -1, head_size)
    transposed = key.float().permute(1, 2, 0).unsqueeze(1)
    place = torch.arange(num_tokens, device=query.device)
    step = max(1, _MAX_PROBABILITIES // (num_heads * num_tokens))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        logits = grouped[part].permute(1, 2, 0, 3).float() * scale @ transposed
        yield part, logits.masked_fill_(place > part[:, None], float("-inf"))
