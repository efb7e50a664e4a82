# SPDX-License-Identifier: Apache-2.0
"""Criteria compared on a checkpoint, in plain PyTorch: `python -m training.criteria MODEL`.

Outside the engine, so that a criterion can be tried before it is worth a place there. All pairs of
criteria (first cut, second cut) get the same held-out questions and the same numbers of tokens. A
question is answered right if each token of its first answer is the most likely one after those
before it, which is what greedy decoding would say.

With `--second` each question follows another one, about another object, and its right answer. What
is kept is what the first one voted for, as with `votes: turn`.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from himap_demo.heldout import FIRST_SEED
from himap_demo.questions import KINDS, Question, ask
from himap_demo.scenes import draw, make_scene
from himap_eval.pareto import ratios_for
from himap_eval.stats import Retention, retention
from himap_eval.tables import interval, markdown_table, percent
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from himap_vllm.plan.prompt import Ratios

from .choices import CHOICES, Seen
from .data import pixel_values
from .model import IMAGE_TOKENS, attention_of, image_features, sees
from .tokenizer import AFTER_QUESTION, BEFORE_IMAGE, BOS, IMAGE

Pair = tuple[str, str]
ONE_OBJECT = dict.fromkeys(("color", "shape", "where", "number", "word"), 1.0)
BATCH = 48
CALIBRATION = 60_000
"""First scene that the positional prior comes from."""


@dataclass(frozen=True)
class Sample:
    """A conversation whose last answer counts.

    Attributes:
        pixels: [3, SIZE, SIZE].
        tokens: all behind the image, the last answer included.
        voters: tokens at the front that vote.
        answer: tokens at the end that must be said.
    """

    pixels: Tensor
    tokens: list[int]
    voters: int
    answer: int
    kind: str
    tag: str
    scene: int


class Model:
    """A checkpoint, its decoder taken layer by layer."""

    def __init__(self, path: Path) -> None:
        self.llava = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.llava.set_attn_implementation("eager")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        self.decoder = self.llava.model.language_model
        self.prefix = self.ids(BOS + BEFORE_IMAGE + IMAGE * IMAGE_TOKENS)
        self.first = len(self.prefix) - IMAGE_TOKENS

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def said(self, question: Question) -> list[int]:
        return [*self.ids(" " + question.answers[0]), self.tokenizer.eos_token_id]


def samples(model: Model, first: int, count: int, per_scene: int, second: bool) -> list[Sample]:
    """Questions about `count` held-out scenes from number `first` on; kinds take turns."""
    found = []
    for number in range(first, first + count):
        scene = make_scene(FIRST_SEED + number)
        pixels = pixel_values(draw(scene))
        rng = random.Random(scene.seed)
        pairs: list[tuple[Question | None, Question]]
        if second:
            asked = ask(rng, scene, 8, ONE_OBJECT)
            others = [question for question in asked if question.thing != asked[0].thing]
            pairs = [(asked[0], question) for question in others[:per_scene]]
        else:
            turns = [KINDS[(number * per_scene + i) % len(KINDS)] for i in range(per_scene)]
            asked = [q for kind in turns for q in ask(rng, scene, 1, {kind: 1.0})]
            pairs = [(None, question) for question in asked]
        for before, question in pairs:
            tokens = model.ids("\n" + (before or question).text + AFTER_QUESTION)
            voters = len(tokens)
            if before is not None:
                tokens += model.said(before)
                tokens += model.ids(BEFORE_IMAGE) + model.ids(question.text + AFTER_QUESTION)
            answer = model.said(question)
            tag = ""
            if question.thing is not None:
                tag = "small objects" if question.thing.small else "large objects"
            row = (pixels, tokens + answer, voters, len(answer), question.kind, tag, number)
            found.append(Sample(*row))
    return found


@dataclass
class Rows:
    """A batch behind some layer, along one way of choosing."""

    hidden: Tensor
    positions: Tensor
    places: Tensor
    """[batch, n] places in the picture of the image tokens that are left."""


@dataclass
class Batch:
    """Questions as tensors, padded on the right."""

    tokens: Tensor
    pixels: Tensor
    voters: Tensor
    last_voter: Tensor
    answers: Tensor

    @classmethod
    def of(cls, model: Model, group: Sequence[Sample]) -> "Batch":
        front = len(model.prefix)
        length = front + max(len(sample.tokens) for sample in group)
        tokens = torch.full((len(group), length), model.tokenizer.pad_token_id)
        voters = torch.zeros(len(group), length - front)
        answers = torch.zeros(len(group), length - front, dtype=torch.bool)
        for row, sample in enumerate(group):
            end = len(sample.tokens)
            tokens[row, : front + end] = torch.tensor(model.prefix + sample.tokens)
            voters[row, : sample.voters] = 1.0
            answers[row, end - sample.answer : end] = True
        last = torch.tensor([sample.voters - 1 for sample in group])
        return cls(tokens, torch.stack([s.pixels for s in group]), voters, last, answers)


@dataclass
class Cuts:
    """Where tokens go, how many stay, and who chooses.

    prior: [IMAGE_TOKENS] of both cuts; None: it is being measured, and nothing goes.
    """

    layers: tuple[int, int]
    keep: tuple[int, int] = (IMAGE_TOKENS, IMAGE_TOKENS)
    pairs: Sequence[Pair] = ()
    prior: tuple[Tensor, Tensor] | None = None
    votes: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def right(model: Model, batch: Batch, cuts: Cuts) -> dict[tuple[str, ...], Tensor]:
    """Whether each question is answered right, by pair; without pairs by the empty tuple."""
    features = image_features(model.llava, batch.pixels)
    image = model.llava.model.multi_modal_projector(features)
    hidden = model.decoder.embed_tokens(batch.tokens)
    at_image = (batch.tokens == model.llava.config.image_token_id)[..., None]
    size, length = batch.tokens.shape
    ways: dict[tuple[str, ...], Rows] = {
        (): Rows(
            hidden.masked_scatter(at_image, image),
            torch.arange(length).expand(size, -1),
            torch.arange(IMAGE_TOKENS).expand(size, -1),
        )
    }
    for number, layer in enumerate(model.decoder.layers, 1):
        next_ways = {}
        for names, rows in ways.items():
            came = rows.hidden
            rotary = model.decoder.rotary_emb(came, rows.positions)
            mask = sees(torch.zeros_like(rows.positions)).float()
            rows.hidden = layer(
                came,
                attention_mask=mask,
                position_ids=rows.positions,
                position_embeddings=rotary,
            )
            if number not in cuts.layers or not (cuts.pairs or cuts.prior is None):
                next_ways[names] = rows
                continue
            attention = attention_of(layer, came, rotary, mask)
            for more in _choose(model, batch, cuts, names, rows, came, attention):
                next_ways[more[0]] = more[1]
        ways = next_ways
    questions = batch.voters.shape[1]
    wanted = batch.tokens[:, -questions:]
    found = {}
    for names, rows in ways.items():
        normed = model.decoder.norm(rows.hidden[:, -questions - 1 : -1])
        same = model.llava.lm_head(normed).argmax(-1) == wanted
        found[names] = (same | ~batch.answers).all(1)
    return found


def _choose(
    model: Model,
    batch: Batch,
    cuts: Cuts,
    names: tuple[str, ...],
    rows: Rows,
    came: Tensor,
    attention: Tensor,
) -> Iterator[tuple[tuple[str, ...], Rows]]:
    """The ways behind a cut: one for each criterion that some pair has here."""
    size, left = rows.places.shape
    image = slice(model.first, model.first + left)
    asked = attention[:, image.stop :, image]
    text = torch.einsum("br,brn->bn", batch.voters, asked) / batch.voters.sum(1, keepdim=True)
    if cuts.prior is None:
        cuts.votes.append(text.sum(0))
        yield names, rows
        return
    cut = len(names)
    seen = Seen(
        keep=cuts.keep[cut],
        text=text,
        first_row=asked[:, 0],
        last_row=asked[torch.arange(size), batch.last_voter],
        own=attention[:, image, image].mean(1),
        prior=cuts.prior[cut][rows.places],
        states=rows.hidden[:, image],
        before=came[:, image],
    )
    everyone = torch.arange(rows.hidden.shape[1]).expand(size, -1)
    for name in sorted({pair[cut] for pair in cuts.pairs if pair[:cut] == names}):
        kept = CHOICES[name](seen)
        parts = [everyone[:, : image.start], kept + image.start, everyone[:, image.stop :]]
        stay = torch.cat(parts, 1)
        wide = stay[..., None].expand(-1, -1, rows.hidden.shape[2])
        yield (
            (*names, name),
            Rows(
                rows.hidden.gather(1, wide),
                rows.positions.gather(1, stay),
                rows.places.gather(1, kept),
            ),
        )


def by_batch(model: Model, found: Sequence[Sample]) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of samples of about one length, and their batch."""
    order = sorted(range(len(found)), key=lambda i: len(found[i].tokens))
    for begin in range(0, len(order), BATCH):
        numbers = order[begin : begin + BATCH]
        yield numbers, Batch.of(model, [found[i] for i in numbers])


def prior_of(model: Model, layers: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """The attention that a place gets before both cuts, the mean over questions."""
    found = samples(model, CALIBRATION, count, 2, second=False)
    sums = [torch.zeros(IMAGE_TOKENS) for _ in layers]
    for _, batch in by_batch(model, found):
        cuts = Cuts(layers)
        right(model, batch, cuts)
        for total, votes in zip(sums, cuts.votes, strict=True):
            total += votes
    shallow, deep = (total / len(found) for total in sums)
    return shallow, deep


def scores(model: Model, found: Sequence[Sample], cuts: Cuts) -> dict[tuple[str, ...], list[float]]:
    """1 or 0 of each sample, by pair."""
    all_scores: dict[tuple[str, ...], list[float]] = {}
    for numbers, batch in by_batch(model, found):
        for names, row in right(model, batch, cuts).items():
            own = all_scores.setdefault(names, [0.0] * len(found))
            for number, value in zip(numbers, row.tolist(), strict=True):
                own[number] = float(value)
    return all_scores


def table(
    found: Sequence[Sample], unpruned: list[float], by_pair: dict[tuple[str, ...], list[float]]
) -> str:
    """Retention of each pair, the best first, as a share of `uniform`'s, too; accuracy by kind."""
    groups = [str(sample.scene) for sample in found]
    tags = sorted({sample.tag for sample in found} - {""})
    kinds = [kind for kind in KINDS if any(sample.kind == kind for sample in found)]

    def accuracy(row: list[float], label: str) -> str:
        own = [row[i] for i, s in enumerate(found) if label in (s.kind, s.tag)]
        return percent(sum(own) / len(own), 0).removesuffix(" %")

    def cells(row: list[float]) -> list[str]:
        return [accuracy(row, label) for label in (*tags, *kinds)]

    even = by_pair.get(("uniform", "uniform"))
    rows: list[tuple[Retention, list[str]]] = []
    for names, row in by_pair.items():
        kept = retention(row, unpruned, groups)
        share = "-" if even is None else interval(retention(row, even, groups))
        first, second = names
        name = first if first == second else f"{first}+{second}"
        rows.append((kept, [name, interval(kept), share, *cells(row)]))
    rows.sort(key=lambda row: -row[0].value)
    head = ["criterion", "retention (95 %)", "share of `uniform`", *tags, *kinds]
    reference = ["unpruned", "", "", *cells(unpruned)]
    return markdown_table(head, [reference, *(cell for _, cell in rows)])


def pair_of(text: str) -> Pair:
    """`a+b`, or `a` for both cuts.

    Raises:
        argparse.ArgumentTypeError: no such criterion.
    """
    first, _, second = text.partition("+")
    if not {first, second or first} <= set(CHOICES):
        raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(CHOICES)}")
    return first, second or first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--criteria", type=pair_of, nargs="+", required=True)
    parser.add_argument("--layers", type=int, nargs=2, default=(1, 5))
    parser.add_argument("--reductions", type=float, nargs="+", default=(0.5, 0.67, 0.78, 0.89))
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--first-scene", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=3, help="per scene")
    parser.add_argument("--second", action="store_true", help="ask second questions")
    parser.add_argument("--calibrate", type=int, default=200, help="scenes of the prior")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model(args.model)
    layers = (args.layers[0], args.layers[1])
    found = samples(model, args.first_scene, args.scenes, args.questions, args.second)
    prior = prior_of(model, layers, args.calibrate)
    whole = Cuts(layers, prior=prior)
    unpruned = scores(model, found, whole)[()]
    print(f"{len(found)} questions, unpruned {percent(sum(unpruned) / len(found))} right")
    for reduction in args.reductions:
        ratios = ratios_for(reduction, layers, len(model.decoder.layers))
        if ratios is None:
            print(f"\nCuts at {layers} are too late for {percent(reduction, 0)}.")
            continue
        keep = kept(ratios)
        print(f"\n## {percent(reduction, 0)}: {ratios}, {keep[0]} and {keep[1]} tokens left\n")
        cuts = Cuts(layers, keep, args.criteria, prior)
        print(table(found, unpruned, scores(model, found, cuts)), flush=True)


def kept(ratios: Ratios) -> tuple[int, int]:
    """Image tokens that are left behind both cuts."""
    shallow = max(1, IMAGE_TOKENS - int(IMAGE_TOKENS * ratios.shallow + 1e-6))
    return shallow, max(1, shallow - int(shallow * ratios.deep + 1e-6))


if __name__ == "__main__":
    main()
