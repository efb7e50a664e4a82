# SPDX-License-Identifier: Apache-2.0
"""HiMAP computed the plain way: batch 1, eager attention, transformers' own modules, float32.

This is what the tests hold the product to, so it shares no code with it. What goes into the decoder
(image features in their places, positions, deepstack features) is what the model's own `forward`
hands it; from there on every layer is run here.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from tests.oracle_criteria import between, rank

BLIND = {"uniform", "random", "diversity"}
"""Criteria that read no text."""


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


class _DecoderReached(Exception):  # noqa: N818 - not an error
    """The model's `forward` has come to its decoder, with these arguments."""


@dataclass(frozen=True)
class _Input:
    """What goes into the decoder.

    Attributes:
        hidden: [1, n, hidden] image features in their places.
        positions: [n], or [3, n] with M-RoPE.
        deepstack: [levels][image tokens, hidden] added to the image tokens after layer 0, 1, ...
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    deepstack: Sequence[torch.Tensor]


@dataclass(frozen=True)
class _Prefilled:
    """What is left of a prompt.

    Attributes:
        hidden: [1, rows left, hidden] output of the last layer.
        kept_shallow, kept_deep: as in `OracleResult`.
        margins: of each choice; infinite if no score decided anything.
    """

    hidden: torch.Tensor
    kept_shallow: list[list[int]]
    kept_deep: list[list[int]]
    margins: list[float]


class Oracle:
    """A checkpoint, cut after decoder layers `shallow_layer - 1` and `deep_layer - 1`.

    `criterion` is what the cuts go by: a name in the engine's documentation, or two, joined by "+".
    `marker` opens each turn of the assistant. The text of an image's turn votes for it, up to the
    end of the marker behind it; with `votes` "all", all text behind it.
    """

    def __init__(
        self, checkpoint: Path, shallow_layer: int, deep_layer: int, criterion: str = "himap"
    ) -> None:
        model, report = AutoModelForImageTextToText.from_pretrained(
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
        inner = model.model
        self.decoder = inner.text_model if hasattr(inner, "text_model") else inner.language_model
        if not 1 <= shallow_layer < deep_layer < len(self.decoder.layers):
            raise ValueError(f"cuts {shallow_layer}, {deep_layer} do not fit the decoder")
        self.shallow_layer, self.deep_layer = shallow_layer, deep_layer
        self.criterion = criterion
        self.votes = "turn"
        self.marker = " ASSISTANT:"
        self.prior: dict[str, list[float]] = {}  # by layer, as its file has it
        self._inside: set[int] = set()  # places between the first and last token of an image
        self._share: dict[int, float] = {}  # where an image token's middle lies in its image
        self._whole: list[tuple[int, int]] = []  # first and last token of each image
        self.processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
        self.image_token: int = model.config.image_token_id

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | list[int],
        images: Sequence[Image.Image],
        shallow_ratio: float | Sequence[float],
        deep_ratio: float | Sequence[float],
        max_tokens: int,
        ignore_eos: bool = True,
    ) -> OracleResult:
        """Generate greedily; `prompt` holds one image placeholder per image, in order.

        A prompt given as ids is used as it is, its images expanded already. A ratio is that of all
        images, or has one number for each.
        """
        ids, vision = self._process(prompt, images)
        spans = self._spans(ids, images)
        start = self._embed(ids, vision)
        cache = DynamicCache()  # each layer holds the rows which that layer saw
        prefilled = self._prefill(ids, spans, start, (shallow_ratio, deep_ratio), cache)
        steps = [self._logprobs(prefilled.hidden)]
        tokens = [int(steps[-1].argmax())]
        end = self.model.config.text_config.eos_token_id
        following = int(start.positions.amax()) + 1
        while len(tokens) < max_tokens and (ignore_eos or tokens[-1] != end):
            hidden = self.decoder.embed_tokens(torch.tensor([[tokens[-1]]]))
            positions = torch.full_like(start.positions[..., :1], following + len(tokens) - 1)
            for index in range(len(self.decoder.layers)):
                hidden, _ = self._layer(index, hidden, positions, cache)
            steps.append(self._logprobs(hidden))
            tokens.append(int(steps[-1].argmax()))

        best = torch.stack(steps).topk(2, dim=-1).values
        return OracleResult(
            prompt_token_ids=ids,
            tokens=tokens,
            logprobs=[float(step[token]) for step, token in zip(steps, tokens, strict=True)],
            all_logprobs=torch.stack(steps),
            kept_shallow=prefilled.kept_shallow,
            kept_deep=prefilled.kept_deep,
            margin=float((best[:, 0] - best[:, 1]).min()),
            score_margin=min(prefilled.margins),
        )

    def _prefill(
        self,
        ids: list[int],
        spans: list[list[int]],
        start: _Input,
        ratios: tuple[float | Sequence[float], float | Sequence[float]],
        cache: DynamicCache,
    ) -> _Prefilled:
        """Run all layers on the prompt, and cut twice."""
        hidden, positions = start.hidden, start.positions
        self._inside = {p for image in spans for p in range(image[0] + 1, image[-1])}
        self._share = {p: (i + 0.5) / len(im) for im in spans for i, p in enumerate(im)}
        self._whole = [(image[0], image[-1]) for image in spans]
        rows = torch.arange(len(ids))  # place in the prompt of each row of `hidden`
        kept, kept_shallow, margins = spans, spans, [math.inf]
        for index in range(len(self.decoder.layers)):
            hidden, attention = self._layer(index, hidden, positions, cache)
            if index < len(start.deepstack):
                assert self.shallow_layer >= len(start.deepstack)
                hidden[0, [p for image in spans for p in image]] += start.deepstack[index]
            if index + 1 == self.shallow_layer:
                kept, gaps = self._cut(attention, hidden[0], rows, kept, ratios[0], ids, deep=False)
                kept_shallow = kept
            elif index + 1 == self.deep_layer:
                kept, gaps = self._cut(attention, hidden[0], rows, kept, ratios[1], ids, deep=True)
            else:
                continue
            margins += gaps
            alive = {p for image in kept for p in image}
            stay = torch.tensor([ids[p] != self.image_token or p in alive for p in rows.tolist()])
            hidden, rows, positions = hidden[:, stay], rows[stay], positions[..., stay]
        return _Prefilled(hidden, kept_shallow, kept, margins)

    def _process(
        self, prompt: str | list[int], images: Sequence[Image.Image]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Return the prompt's ids, images expanded, and the inputs of the vision tower."""
        made = {}
        if images:
            placeholders = self._placeholder() * len(images)
            text = prompt if isinstance(prompt, str) else placeholders
            made = dict(self.processor(text=[text], images=[*images], return_tensors="pt"))
        elif isinstance(prompt, str):
            made = dict(self.processor.tokenizer([prompt], return_tensors="pt"))
        ids = made["input_ids"][0].tolist() if isinstance(prompt, str) else list(prompt)
        text_inputs = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        return ids, {name: value for name, value in made.items() if name not in text_inputs}

    def _placeholder(self) -> str:
        """What stands for an image in a prompt."""
        token: str = self.processor.image_token
        return token

    def _spans(self, ids: list[int], images: Sequence[Image.Image]) -> list[list[int]]:
        """Return the places of each image's tokens; adjacent images are told apart by length."""
        places = [p for p, token in enumerate(ids) if token == self.image_token]
        spans, begin = [], 0
        for image in images:
            alone, _ = self._process(self._placeholder(), [image])
            count = alone.count(self.image_token)
            spans.append(places[begin : begin + count])
            begin += count
        assert begin == len(places), f"{len(places)} image tokens, not {begin}"
        return spans

    def _embed(self, ids: list[int], vision: dict[str, torch.Tensor]) -> _Input:
        """Return what the model would have its decoder work on."""
        inputs: dict[str, Any] = {
            name: value.float() if value.is_floating_point() else value
            for name, value in vision.items()
        }
        prompt = torch.tensor([ids])
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None  # of the prompt before
            inputs["mm_token_type_ids"] = (prompt == self.image_token).int()

        def catch(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            raise _DecoderReached(kwargs)

        hook = self.decoder.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model.model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **inputs)
            raise AssertionError("the model did not call its decoder")
        except _DecoderReached as caught:
            (given,) = caught.args
        finally:
            hook.remove()
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(len(ids))[None]
        return _Input(
            hidden=given["inputs_embeds"].clone(),
            # [batch, n], or [3, batch, n] with M-RoPE.
            positions=positions[..., 0, :],
            deepstack=given.get("deepstack_visual_embeds") or (),
        )

    def _layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one decoder layer on `hidden` [1, n, hidden] at `positions` ([n] or [3, n]).

        Return its output and its attention, mean over heads, float32 [n, cached + n].
        """
        layer, n = self.decoder.layers[index], hidden.shape[1]
        # Rows ascend, so the mask of the prompt is a triangle; a generated token sees everything.
        mask = torch.full((n, n), -math.inf).triu(1)[None, None] if n > 1 else None
        mixed, attention = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.decoder.rotary_emb(hidden, positions.unsqueeze(-2)),
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
        ratio: float | Sequence[float],
        ids: list[int],
        deep: bool,
    ) -> tuple[list[list[int]], list[float]]:
        """Choose what is kept of `images`, given a layer's `attention` [n, n] and its output.

        Return the kept positions per image and, per image that lost any, the margin of the choice.
        """
        row_of = {p: row for row, p in enumerate(rows.tolist())}
        last = len(ids) - 1
        kept, margins = [], []
        criterion = self.criterion.split("+")[-1 if deep else 0]
        ends = [self._end(ids, image) for image in images]
        lots: dict[int, Any] = {}
        for end in ends:
            seed = zlib.crc32(struct.pack(f"<{end}q", *ids[:end]))
            of_unit = sum(len(i) for i, its_end in zip(images, ends, strict=True) if its_end == end)
            drawn = np.random.default_rng((seed, int(deep))).permutation(of_unit)
            lots.setdefault(end, iter(drawn.tolist()))
        for place, (image, end) in enumerate(zip(images, ends, strict=True)):
            own_ratio = ratio if isinstance(ratio, int | float) else ratio[place]
            n = max(1, len(image) - math.floor(len(image) * own_ratio + 1e-6))
            text = [p for p in range(image[-1], end) if ids[p] != self.image_token]
            if criterion != "himap":
                text = [p for p in text if p not in self._inside]
            text = text or [end - 1]
            one = criterion in ("fastv", "mixed")
            voters = text[-1:] if one else image if deep and criterion == "himap" else text
            if criterion in BLIND:
                voters = []
            columns = attention[:, [row_of[p] for p in image]]
            scores = columns[[row_of[p] for p in voters]].sum(dim=0)
            chance = torch.tensor([float(next(lots[end])) for _ in image])
            states = hidden[[row_of[p] for p in image]]
            if criterion == "debiased":
                known = self.prior[str(self.deep_layer if deep else self.shallow_layer)]
                scores = scores / torch.tensor([between(known, self._share[p]) for p in image])
            scores, close = rank(criterion, scores, states, chance, n)
            if image[-1] == last:
                scores[-1] = math.inf  # the next token is predicted from this row
            order = scores.argsort(descending=True, stable=True).tolist()
            kept.append(sorted(image[i] for i in order[:n]))
            if n < len(image):
                # Uniform places are not scored; equal scores are no close call.
                gap = float(scores[order[n - 1]] - scores[order[n]])
                placed = criterion in ("uniform", "stratified", "half")
                margins.append(close if placed else min(gap, close))
        return kept, margins

    def _end(self, ids: list[int], image: list[int]) -> int:
        """Return the place behind the last token that has a part in what is kept of an image."""
        if BLIND.issuperset(self.criterion.split("+")):
            return max(p for p in self._whole if p[0] <= image[0] <= p[1])[1] + 1
        marker = self.processor.tokenizer.encode(self.marker, add_special_tokens=False)
        if self.votes == "turn":
            for begin in range(image[-1] + 1, len(ids)):
                if ids[begin : begin + len(marker)] == marker:
                    return begin + len(marker)
        return len(ids)

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities [vocab] that follow the last row of `hidden`."""
        logits: torch.Tensor = self.model.lm_head(self.decoder.norm(hidden[0, -1]))
        return logits.float().log_softmax(dim=-1)
