# SPDX-License-Identifier: Apache-2.0
"""What a criterion costs of a pruned prefill: `python -m bench.criterion_cost`.

One prompt at a time, one new image each, random weights, 32 layers. The share is that of scoring
and selection (`pruning_seconds` of the plugin's counters: on a CPU all of their time, on a GPU the
time to launch them) in the time from request to first token. Beside it is the arithmetic: FLOPs of
the attention that votes over those of the pruned prefill.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from himap_eval.options import positive
from himap_eval.tables import to_json

from bench.model import PATCH_SIZE, Cuts, Model, Tower
from bench.tables import environment, progress, report, table, versions
from bench.worker import Worker
from himap_vllm.plan.prompt import Ratios
from tests.checkpoints import build_llava, sample_images

CUTS = Cuts(2, 8, Ratios(0.5, 0.75))
QUESTION = "What is in the picture? Answer with one word."
TEXT, IMAGE = "text", "image"
CRITERIA = {
    "uniform": (None, None),
    "uniform+half": (None, TEXT),
    "himap": (TEXT, IMAGE),
    "diversity": (None, None),
}
"""Criteria, with the rows that vote at each cut."""
SIDES = (24, 64)
"""Patches along an image's side: 576 tokens as LLaVA-1.5 has them, and 4,096."""


@dataclass(frozen=True)
class Cell:
    """One criterion at one size of image. `seconds` and `pruning` are medians of a prompt."""

    criterion: str
    image_tokens: int
    seconds: float
    pruning: float
    arithmetic: float


class Measured:
    """An engine with one criterion."""

    def __init__(self, folder: Path, criterion: str, num_tokens: int) -> None:
        from tests.engines import Engine

        himap = {**CUTS.engine_settings(), "criterion": criterion}
        self._engine = Engine(
            folder,
            himap,
            {
                "dtype": "bfloat16",
                "max_model_len": num_tokens + 128,
                "max_num_batched_tokens": num_tokens + 128,
                "kv_cache_memory_bytes": 2 << 30,
            },
        )

    def prompt(self, number: int, size: int) -> tuple[float, float]:
        """Seconds to the first token, and of pruning among them, of one new picture."""
        from tests.engines import Case

        (image,) = sample_images(1, number, size)
        ratios = CUTS.ratios.shallow, CUTS.ratios.deep
        case = Case(f"USER: <image>\n{QUESTION} ASSISTANT:", (image,), ratios, 1)
        before = self._engine.stats["pruning_seconds"]
        begun = time.perf_counter()
        self._engine.generate([case])
        seconds = time.perf_counter() - begun
        return seconds, self._engine.stats["pruning_seconds"] - before


def arithmetic(model: Model, criterion: str, text: int) -> float:
    """FLOPs of query times key for the rows that vote, over those of the pruned prefill."""
    stages = CUTS.stage_tokens(model.image_tokens + text, model.image_tokens)
    voting = sum(
        2 * {None: 0, TEXT: text, IMAGE: tokens - text}[voters] * tokens * model.hidden_size
        for voters, tokens in zip(CRITERIA[criterion], stages[:2], strict=True)
    )
    return voting / sum(piece.flops for piece in model.prefill(text, CUTS))


def measure(criterion: str, side: int, rounds: int, folder: Path) -> Cell:
    """Run an engine in a process of its own."""
    tower = Tower(side * PATCH_SIZE, 32, 64, 3, 2)
    model = Model(32, 8, 1024, 2752, tower)
    checkpoint = folder / str(side)
    if not checkpoint.exists():
        build_llava(
            checkpoint, num_layers=32, num_heads=8, num_kv_heads=8, hidden_size=1024,
            intermediate_size=2752, image_size=side * PATCH_SIZE,
            max_position_embeddings=8192,
        )  # fmt: skip
    worker = Worker(
        Measured, checkpoint, criterion, side * side, log=folder / "log", environment={}
    )
    size = side * PATCH_SIZE
    found = [worker.call(600, "prompt", number, size) for number in range(rounds + 1)][1:]
    worker.stop()
    text = len(QUESTION) + 20  # the tokenizer's tokens are characters
    return Cell(
        criterion,
        side * side,
        median(seconds for seconds, _ in found),
        median(pruning for _, pruning in found),
        arithmetic(model, criterion, text),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.criterion_cost", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, default=Path("criterion-cost"))
    args = parser.parse_args()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            for criterion in CRITERIA:
                cells.append(measure(criterion, side, args.rounds, Path(folder)))
                progress(str(cells[-1]))
    machine = environment()
    rows: list[list[Any]] = [
        [
            cell.image_tokens,
            f"`{cell.criterion}`",
            f"{cell.seconds:.2f} s",
            f"{1000 * cell.pruning:.1f} ms",
            f"{cell.pruning / cell.seconds:.2%}",
            f"{cell.arithmetic:.3%}",
        ]
        for cell in cells
    ]
    header = ["image tokens", "criterion", "prefill", "pruning", "share", "votes' arithmetic"]
    numbers = {"machine": machine, "cells": [asdict(cell) for cell in cells]}
    args.output.with_suffix(".json").write_text(to_json(numbers))
    args.output.with_suffix(".md").write_text(
        report({"What a criterion costs": versions(machine) + "\n\n" + table(header, rows)})
    )


if __name__ == "__main__":
    main()
