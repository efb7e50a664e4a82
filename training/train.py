# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled model: `python -m training.train --out runs/demo`.

Two stages. First the vision tower learns what each patch shows (colour, shape and digit of its
object, and its cell); then everything learns to answer, the first task staying on as an auxiliary
loss. The learning rate warms up, stays, and falls linearly over the last `--decay` steps.

A run is interrupted by Ctrl-C (or SIGTERM) and goes on with `--resume`; examples are numbered and
nothing is random but the first weights, so it ends where an uninterrupted one would, but for the
order of floating-point sums. `--resume --steps N` with another N moves the end. `--from MODEL`
continues from an exported checkpoint instead.
"""

import argparse
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .data import batches
from .export import export
from .model import (
    IMAGE_TOKENS,
    MATMUL,
    SIDE,
    Cut,
    PatchHeads,
    answer_logits,
    build_config,
    image_features,
)
from .tokenizer import VOCABULARY, build_tokenizer

TOWER_BATCH = 64
BATCH = 16
WARM_UP = 100
CUT_LAYERS = (1, 5)
CUTS = ((0.5, 0.75), (0.25, 0.5), (0.65, 0.88), (0.5, 0.75))
"""Ratios of both cuts of the steps that prune, in turn."""
NOISE = 0.5
"""Of the votes in training."""
TOWER_DECAY = 0.5
"""Share of the tower's own stage over which its learning rate falls."""
MUON_RATE = 2.0
"""Muon's learning rate over AdamW's."""
PATCH_LOSS = 0.4
"""Weight of the patches' loss in the second stage."""
TOWER_RATE = 0.2
"""Share of the rate that the tower has in the second stage: at the whole one it forgets text."""


@dataclass
class State:
    """All that a run is: weights, optimisers, and how far it has come in both stages."""

    model: LlavaForConditionalGeneration
    heads: PatchHeads
    optimizers: list[torch.optim.Optimizer]
    rate: float
    done: dict[str, int] = field(default_factory=lambda: {"tower": 0, "answers": 0})

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        content = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
        }
        torch.save(content, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.heads.load_state_dict(content["heads"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.done = content["done"]


def build_optimizers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon/) needs fewer steps; its own time is a twentieth
    of a step's. Scaled as in https://arxiv.org/abs/2502.16982, it takes about AdamW's rate.
    """
    matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    rest: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "heads" not in name
            (matrices if hidden else rest)["vision_tower" in name].append(parameter)

    def groups(parameters: dict[bool, list[nn.Parameter]]) -> list[dict[str, Any]]:
        return [{"params": own, "tower": tower} for tower, own in parameters.items()]

    return [
        torch.optim.Muon(
            groups(matrices), lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups(rest), lr=rate, weight_decay=0.02, betas=(0.9, 0.98)),
    ]


def rate_at(step: int, steps: int, decay: int) -> float:
    """Share of the learning rate at a step: up over WARM_UP, 1, down to 0 over the last `decay`."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (steps - step) / decay))


class Progress:
    """Prints, once in a while, how far a stage is and when it will have ended."""

    def __init__(self, stage: str, first: int, steps: int, every: int = 50) -> None:
        self.stage, self.first, self.steps, self.every = stage, first, steps, every
        self.started = time.monotonic()
        self.means: dict[str, float] = {}

    def step(self, step: int, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.means[key] = 0.95 * self.means.get(key, value.item()) + 0.05 * value.item()
        done = step + 1 - self.first
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            per_step = (time.monotonic() - self.started) / done
            means = "  ".join(f"{key} {value:.3f}" for key, value in self.means.items())
            left = (self.steps - step - 1) * per_step / 60
            print(
                f"{self.stage} {step + 1}/{self.steps}  {means}  "
                f"{per_step:.2f} s/step  {left:.0f} min left",
                flush=True,
            )


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is finished and saved."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def _raise(self, number: int, _: object) -> None:
        self.raised = True
        signal.signal(number, signal.SIG_DFL)


def draw_cuts(step: int, share: float, batch: int) -> list[Cut]:
    """What a step keeps. In 1 - `share` of the steps nothing is cut.

    At the first cut evenly spaced tokens from a random one on, or random ones. At the second one
    those that the question attends to, in every third step random ones. The tokens are drawn from
    the step's number, apart for each example.
    """
    rng = torch.Generator().manual_seed(step)
    if float(torch.rand((), generator=rng)) >= share:
        return []
    shallow, deep = CUTS[step % len(CUTS)]
    kept = round(IMAGE_TOKENS * (1 - shallow))
    if step % 2:
        begins = torch.rand((batch, 1), generator=rng)
        first = ((torch.arange(kept) + begins) * IMAGE_TOKENS / kept).long()
    else:
        first = _random(rng, batch, IMAGE_TOKENS, kept)
    last = round(kept * (1 - deep))
    if step % 3 == 0:
        second = Cut(CUT_LAYERS[1], kept=_random(rng, batch, kept, last))
    else:
        second = Cut(CUT_LAYERS[1], votes=last, noise=NOISE)
    return [Cut(CUT_LAYERS[0], kept=first), second]


def _random(rng: torch.Generator, batch: int, total: int, kept: int) -> Tensor:
    return torch.rand((batch, total), generator=rng).argsort(1)[:, :kept].sort(1).values


def losses(
    state: State, stage: str, batch: dict[str, Tensor], cuts: list[Cut]
) -> dict[str, Tensor]:
    """The loss to minimise ("loss") and what else is worth printing."""
    with torch.autocast(batch["pixels"].device.type, torch.bfloat16):
        features = image_features(state.model, batch["pixels"])
        patches = state.heads(features, batch["labels"])
        if stage == "tower":
            return {"loss": patches}
        tokens, positions, segments, voters = (
            batch[key] for key in ("tokens", "positions", "segments", "voters")
        )
        logits = answer_logits(state.model, features, tokens, positions, segments, voters, cuts)
    target, weight = (batch[key][:, -logits.shape[1] :] for key in ("tokens", "weights"))
    wrong = cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
    answers = (weight * wrong).sum() / weight.sum()
    right = (logits.argmax(-1) == target)[weight > 0].float().mean()
    shown = {"patches": patches, "right, pruned" if cuts else "right": right}
    return {"loss": answers + PATCH_LOSS * patches} | shown


def run_stage(
    state: State,
    stage: str,
    data: tuple[PreTrainedTokenizerFast, int, int],
    steps: int,
    decay: int,
    checkpoint: Path,
    save_every: int,
    interrupt: Interrupt,
    cut: float,
) -> bool:
    """Trains from where the state is up to `steps`. False if interrupted.

    `data`: tokenizer, number of the stage's first example, examples per step.
    """
    tokenizer, first, size = data
    begin = state.done[stage]
    device = next(state.model.parameters()).device
    progress = Progress(stage, begin, steps)
    stream = batches(tokenizer, first + begin * size, max(0, steps - begin), size, stage != "tower")
    for step, batch in enumerate(stream, begin):
        rate = state.rate * rate_at(step, steps, decay)
        for optimizer in state.optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            for group in optimizer.param_groups:
                share = TOWER_RATE if group["tower"] and stage == "answers" else 1.0
                group["lr"] = share * (MUON_RATE * rate if muon else rate)
        cuts = draw_cuts(step, cut, size) if stage == "answers" else []
        values = losses(state, stage, {key: value.to(device) for key, value in batch.items()}, cuts)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        values["loss"].backward()
        parameters = [*state.model.parameters(), *state.heads.parameters()]
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
        state.done[stage] = step + 1
        progress.step(step, values)
        if (step + 1) % save_every == 0 or step + 1 == steps or interrupt.raised:
            state.save(checkpoint)
        if interrupt.raised:
            print(f"interrupted at step {step + 1} of {stage}; go on with --resume", flush=True)
            return False
    return True


def start_from(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Gives the model an exported checkpoint's weights, also one's for smaller pictures.

    Positions of patches are then interpolated, and words go by their spelling.
    """
    base = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    weights = base.state_dict()
    for name, value in weights.items():
        if name.endswith("position_embedding.weight"):
            weights[name] = torch.cat([value[:1], _interpolated(value[1:], SIDE)])
    known = PreTrainedTokenizerFast.from_pretrained(path).get_vocab()
    words = base.get_input_embeddings().weight.detach()
    rows = torch.randn(VOCABULARY, words.shape[1]) * words.std()
    for token, number in tokenizer.get_vocab().items():
        if token in known:
            rows[number] = words[known[token]]
    for name, value in weights.items():
        if value.data_ptr() == words.data_ptr():  # the embedding, and the head that is tied to it
            weights[name] = rows
    model.load_state_dict(weights)


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """[n * n, width] for a grid of n x n as [side * side, width] for another."""
    before = math.isqrt(len(positions))
    grid = positions.T.reshape(1, -1, before, before)
    return interpolate(grid, (side, side), mode="bicubic").flatten(2)[0].T


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=5500, help="of answering, the end included")
    parser.add_argument("--decay", type=int, help="last steps, of falling rate (20 %% of --steps)")
    parser.add_argument("--tower-steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--cut", type=float, default=0.0, help="share of the steps that drop image tokens"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: on two cores a quarter faster"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--from", dest="base", type=Path, help="an exported checkpoint to start at")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first example (--from: an unseen one)",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "state.pt"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer()
    model = LlavaForConditionalGeneration._from_config(build_config(tokenizer))
    if args.base:
        start_from(model, tokenizer, args.base)
    model.set_attn_implementation(MATMUL)
    if args.compile:
        # Each number of tokens is compiled by itself; steps that prune have some ten.
        torch._dynamo.config.recompile_limit = 32
        decoder, tower = model.model.language_model, model.model.vision_tower.encoder
        for layer in (*decoder.layers, *tower.layers):
            layer.compile(dynamic=False)
    heads = PatchHeads()
    model.to(device).train()
    heads.to(device)
    state = State(model, heads, build_optimizers([model, heads], args.rate), args.rate)
    if args.resume:
        state.load(checkpoint)
    interrupt = Interrupt()
    tower = (tokenizer, args.first, TOWER_BATCH)
    answers = (tokenizer, args.first + args.tower_steps * TOWER_BATCH, BATCH)
    tower_decay = max(1, round(args.tower_steps * TOWER_DECAY))
    decay = args.decay or max(1, args.steps // 5)
    rest = (checkpoint, args.save_every, interrupt, args.cut)
    if run_stage(state, "tower", tower, args.tower_steps, tower_decay, *rest) and run_stage(
        state, "answers", answers, args.steps, decay, *rest
    ):
        export(model, tokenizer, args.out / "model")
        print(f"exported to {args.out / 'model'}", flush=True)


if __name__ == "__main__":
    main()
