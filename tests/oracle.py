# SPDX-License-Identifier: Apache-2.0
"""HiMAP computed the plain way: batch 1, eager attention, transformers' own modules, float32.

This is what the tests hold the product to, so it shares no code with it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration


@dataclass(frozen=True)
class OracleResult:
    """One greedy generation.

    Attributes:
        prompt_token_ids: the prompt, every image placeholder expanded to its image tokens.
        tokens: generated ids; the end-of-sequence token is included when it ended the answer.
        logprobs: log-probability of each generated id.
        all_logprobs: log-probabilities of the whole vocabulary, float32 [steps, vocab].
        kept_shallow: per image, prompt positions kept by the shallow cut, ascending.
        kept_deep: per image, prompt positions kept by the deep cut, ascending.
        margin: smallest gap, over steps, between the two best log-probabilities.
        score_margin: smallest gap, over images and cuts, between the lowest kept and the highest
            dropped score; infinite if no score decided anything.
    """

    prompt_token_ids: list[int]
    tokens: list[int]
    logprobs: list[float]
    all_logprobs: torch.Tensor
    kept_shallow: list[list[int]]
    kept_deep: list[list[int]]
    margin: float
    score_margin: float


class Oracle:
    """A LLaVA checkpoint, cut after decoder layers `shallow_layer - 1` and `deep_layer - 1`.

    `criterion` is what the cuts go by: a name in the engine's documentation.
    """

    def __init__(
        self, checkpoint: Path, shallow_layer: int, deep_layer: int, criterion: str = "himap"
    ) -> None:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
        # Transformers fills a weight that it cannot find with noise and goes on.
        wrong = {kind: entries for kind, entries in report.items() if entries}
        if wrong:
            raise RuntimeError(f"{checkpoint} does not load cleanly: {wrong}")
        self.model = model.eval()
        self.decoder = model.model.language_model
        if not 1 <= shallow_layer < deep_layer < len(self.decoder.layers):
            raise ValueError(f"cuts {shallow_layer}, {deep_layer} do not fit the decoder")
        self.shallow_layer, self.deep_layer = shallow_layer, deep_layer
        self.criterion = criterion
        self.processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
        self.image_token: int = model.config.image_token_id
        vision = model.config.vision_config
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | list[int],
        images: Sequence[Image.Image],
        shallow_ratio: float,
        deep_ratio: float,
        max_tokens: int,
        ignore_eos: bool = True,
    ) -> OracleResult:
        """Generate greedily; `prompt` holds one `<image>` (or its id) per image, in order.

        A prompt given as ids is used as it is; its images may be expanded already.
        """
        ids = self._expand(prompt, len(images))
        spans = self._spans(ids)
        cache = DynamicCache()  # each layer holds the rows which that layer saw
        hidden = self._embed(ids, images)  # [1, rows, hidden]
        rows = torch.arange(len(ids))  # prompt position of each row of `hidden`
        kept, kept_shallow, margins = spans, spans, [math.inf]
        for index in range(len(self.decoder.layers)):
            hidden, attention = self._layer(index, hidden, rows, cache)
            if index + 1 == self.shallow_layer:
                kept, gaps = self._cut(
                    attention, hidden[0], rows, kept, shallow_ratio, ids, deep=False
                )
                kept_shallow = kept
            elif index + 1 == self.deep_layer:
                kept, gaps = self._cut(attention, hidden[0], rows, kept, deep_ratio, ids, deep=True)
            else:
                continue
            margins += gaps
            alive = {p for image in kept for p in image}
            stay = torch.tensor([ids[p] != self.image_token or p in alive for p in rows.tolist()])
            hidden, rows = hidden[:, stay], rows[stay]

        steps = [self._logprobs(hidden)]
        tokens = [int(steps[-1].argmax())]
        end = self.model.config.text_config.eos_token_id
        while len(tokens) < max_tokens and (ignore_eos or tokens[-1] != end):
            hidden = self.decoder.embed_tokens(torch.tensor([[tokens[-1]]]))
            rows = torch.tensor([len(ids) + len(tokens) - 1])
            for index in range(len(self.decoder.layers)):
                hidden, _ = self._layer(index, hidden, rows, cache)
            steps.append(self._logprobs(hidden))
            tokens.append(int(steps[-1].argmax()))

        best = torch.stack(steps).topk(2, dim=-1).values
        return OracleResult(
            prompt_token_ids=ids,
            tokens=tokens,
            logprobs=[float(step[token]) for step, token in zip(steps, tokens, strict=True)],
            all_logprobs=torch.stack(steps),
            kept_shallow=kept_shallow,
            kept_deep=kept,
            margin=float((best[:, 0] - best[:, 1]).min()),
            score_margin=min(margins),
        )

    def _expand(self, prompt: str | list[int], images: int) -> list[int]:
        """Return the prompt's ids with every image placeholder expanded."""
        tokenizer, n = self.processor.tokenizer, self.tokens_per_image
        ids: list[int] = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        found = ids.count(self.image_token)
        if found == images * n:
            return ids
        if found != images:
            raise ValueError(f"{found} image placeholders for {images} images")
        return [t for token in ids for t in [token] * (n if token == self.image_token else 1)]

    def _spans(self, ids: list[int]) -> list[list[int]]:
        """Return the positions of each image; adjacent images are told apart by their length."""
        places = [p for p, token in enumerate(ids) if token == self.image_token]
        n = self.tokens_per_image
        return [places[i : i + n] for i in range(0, len(places), n)]

    def _embed(self, ids: list[int], images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the decoder's input [1, len(ids), hidden], image features in their places."""
        hidden: torch.Tensor = self.decoder.embed_tokens(torch.tensor([ids]))
        for image, span in zip(images, self._spans(ids), strict=True):
            pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
            hidden[0, span] = self.model.get_image_features(pixels.float()).pooler_output[0]
        return hidden

    def _layer(
        self, index: int, hidden: torch.Tensor, rows: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one decoder layer on `hidden` [1, n, hidden], whose rows sit at positions `rows`.

        Return its output and its attention, mean over heads, float32 [n, cached + n].
        """
        layer, n = self.decoder.layers[index], hidden.shape[1]
        # Rows ascend, so the mask of the prompt is a triangle; a generated token sees everything.
        mask = torch.full((n, n), -math.inf).triu(1)[None, None] if n > 1 else None
        mixed, attention = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.decoder.rotary_emb(hidden, rows[None]),
            attention_mask=mask,
            past_key_values=cache,
        )
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden, attention[0].float().mean(dim=0)

    def _cut(
        self,
        attention: torch.Tensor,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        images: list[list[int]],
        ratio: float,
        ids: list[int],
        deep: bool,
    ) -> tuple[list[list[int]], list[float]]:
        """Choose what is kept of `images`, given a layer's `attention` [n, n] and its output.

        Return the kept positions per image and, per image that lost any, the margin of the choice.
        """
        row_of = {p: row for row, p in enumerate(rows.tolist())}
        last = len(ids) - 1
        kept, margins = [], []
        lots = np.random.default_rng((zlib.crc32(struct.pack(f"<{len(ids)}q", *ids)), int(deep)))
        shuffled = iter(lots.permutation(sum(map(len, images))).tolist())
        for image in images:
            n = max(1, len(image) - math.floor(len(image) * ratio + 1e-6))
            text = [p for p in range(image[-1], len(ids)) if ids[p] != self.image_token] or [last]
            one = self.criterion in ("fastv", "mixed")
            voters = text[-1:] if one else image if deep else text
            columns = attention[:, [row_of[p] for p in image]]
            scores = columns[[row_of[p] for p in voters]].sum(dim=0)
            chance = torch.tensor([float(next(shuffled)) for _ in image])
            close = math.inf  # smallest gap of a choice on the way
            if self.criterion == "random":
                scores = chance
            elif self.criterion == "uniform":
                scores = torch.zeros(len(image))
                scores[[int((i + 0.5) * len(image) / n) for i in range(n)]] = 1.0
            elif self.criterion in ("diversity", "mixed"):
                order = scores.argsort(descending=True, stable=True).tolist()
                first = order[: math.ceil(n / 2)] if self.criterion == "mixed" else []
                if first:
                    close = float(scores[order[len(first) - 1]] - scores[order[len(first)]])
                states = hidden[[row_of[p] for p in image]]
                chosen, gap = _spread(states, n, first)
                close = min(close, gap)
                scores = torch.zeros(len(image))
                for place, i in enumerate(chosen):
                    scores[i] = n - place
            if image[-1] == last:
                scores[-1] = math.inf  # the next token is predicted from this row
            order = scores.argsort(descending=True, stable=True).tolist()
            kept.append(sorted(image[i] for i in order[:n]))
            if n < len(image):
                # Uniform places are not scored; equal scores are no close call.
                gap = float(scores[order[n - 1]] - scores[order[n]])
                margins.append(close if self.criterion == "uniform" else min(gap, close))
        return kept, margins

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities [vocab] that follow the last row of `hidden`."""
        logits: torch.Tensor = self.model.lm_head(self.decoder.norm(hidden[0, -1]))
        return logits.float().log_softmax(dim=-1)


def _spread(states: torch.Tensor, count: int, first: list[int]) -> tuple[list[int], float]:
    """Greedy max-min: `count` indices into `states` [n, hidden], those of `first` at the front.

    Return them in the order of their choice, and the smallest gap that a choice was made by.
    """
    offset = states - states.mean(dim=0, keepdim=True)
    offset = offset / offset.norm(dim=1, keepdim=True)
    apart = [[1.0 - float(a @ b) for b in offset] for a in offset]
    chosen, closest = list(first), math.inf
    while len(chosen) < count:
        # How far each candidate is from what it is compared with: the chosen, or all others.
        reach = {
            i: min(row[j] for j in (chosen or range(len(row))) if j != i)
            for i, row in enumerate(apart)
            if i not in chosen and len(row) > 1
        } or {0: 0.0}
        ranked = sorted(reach, key=lambda i: (-reach[i], i))
        if len(ranked) > 1:
            closest = min(closest, reach[ranked[0]] - reach[ranked[1]])
        chosen.append(ranked[0])
    return chosen, closest
