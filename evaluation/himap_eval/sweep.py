# SPDX-License-Identifier: Apache-2.0
"""`himap sweep`: where to prune and how much, for a model and a data set.

K1, K2 and the criterion are settings of an engine, so the sweep starts one for each combination.
Ratios belong to requests. Finished cells are lines of a file, so an interrupted sweep continues.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from himap_vllm.plan.prompt import Ratios

from .client import UNPRUNED, Answer, Endpoint, ask_all, first_model
from .errors import CommandError
from .items import Item
from .local_server import engine_flags, serving
from .options import (
    add_data_options,
    data_name,
    engine_parser,
    guarded,
    layer_pair,
    load_items,
    parse,
    ratio,
    ratio_pair,
)
from .pareto import GRID_RATIOS, Cell, EngineChoice, grid_layers, ratios_for, report_layers
from .results import scores_of, summarize
from .sweep_report import Findings, write_grid, write_report

_REDUCTIONS = (0.50, 0.67, 0.78, 0.89)
_KEY = "none"  # an engine that the sweep starts needs no key
_CELL = TypeAdapter(Cell)
_ANSWERS = TypeAdapter(list[Answer])

# A cell to measure: ratios, and the reduction that they were chosen for.
Planned = tuple[Ratios, float | None]


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = engine_parser(
        "sweep", "himap serve", "Retention against cost over K1, K2, R1, R2 and criteria."
    )
    parser.add_argument(
        "--report", action="store_true",
        help="instead of a grid: all criteria at each of --reductions",
    )  # fmt: skip
    parser.add_argument(
        "--criteria", type=lambda text: text.split(","), metavar="NAME,...",
        help="A+B: A at the first cut, B at the second (default: the engine's; with "
        "--report also all that need no file of himap calibrate)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=layer_pair, action="append", metavar="K1,K2",
        help="repeatable (default: by the depth of the decoder)",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=ratio_pair, action="append", metavar="R1,R2",
        help="repeatable (default: 0.25, 0.5, 0.75, 0.9 by 0.5, 0.75, 0.9); not with --report",
    )  # fmt: skip
    parser.add_argument(
        "--reductions", type=lambda text: [ratio(part) for part in text.split(",")],
        default=list(_REDUCTIONS), metavar="SHARE,...",
        help="reductions of image token-layers, with --report (default: 0.5,0.67,0.78,0.89)",
    )  # fmt: skip
    parser.add_argument(
        "--retain", type=float, default=0.98, metavar="SHARE",
        help="share of the accuracy that the recommended setting keeps (default: 0.98)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("himap-sweep"), help="folder (default: himap-sweep)"
    )
    add_data_options(parser)
    args = parse(parser, argv)
    if args.report and args.ratios:
        parser.error("--report chooses the ratios by --reductions")
    return guarded("sweep", _run, args)


def _run(args: Namespace) -> int:
    items = load_items(args)
    plan, unreachable = _plan(args)
    args.output.mkdir(parents=True, exist_ok=True)
    cells = Store(args.output / "cells.jsonl", _about(args, items))
    for number, (engine, planned) in enumerate(plan.items(), start=1):
        missing = [ratios for ratios, _ in planned if (engine, ratios) not in cells.found]
        name = f"{engine.criterion}, {engine.layers} ({number} of {len(plan)})"
        print(f"{name}: {len(missing)} of {len(planned)} settings to do", file=sys.stderr)
        if missing:
            _measure(args, engine, missing, items, cells)
    assert cells.unpruned is not None
    findings = Findings(
        about=cells.about,
        reference=summarize(items, UNPRUNED, cells.unpruned, cells.unpruned),
        cells=[
            replace(cells.found[engine, ratios], target=target)
            for engine, planned in plan.items()
            for ratios, target in planned
        ],
        groups=[item.group for item in items],
        retain=args.retain,
    )
    write = write_report if args.report else write_grid
    text = write(args.output, findings, not args.no_plot)
    for line in unreachable:
        print(line, file=sys.stderr)
    print(f"{text}\nin {args.output}/")
    return 0


def _plan(args: Namespace) -> tuple[dict[EngineChoice, list[Planned]], list[str]]:
    """The settings to measure, by engine, and messages about reductions out of reach."""
    from himap_vllm.config import READS_PRIOR, EngineSettings, HiMAPError, parse_criterion
    from himap_vllm.criteria import CRITERIA

    num_layers = _num_layers(args.model)
    layers = args.layers or (report_layers if args.report else grid_layers)(num_layers)
    late = [pair for pair in layers if pair[1] >= num_layers]
    if late or not layers:
        raise CommandError(f"the decoder has {num_layers} layers: no cut at {late}")
    default = EngineSettings().criterion
    free = [default, *(name for name in CRITERIA if name not in READS_PRIOR)]
    criteria = args.criteria or (free if args.report else [default])
    for criterion in criteria:
        try:
            parse_criterion(criterion)
        except HiMAPError as error:
            raise CommandError(str(error)) from error
    unreachable: list[str] = []
    ratios_of: dict[tuple[int, int], list[Planned]] = {}
    for pair in layers:
        if not args.report:
            ratios_of[pair] = [(ratios, None) for ratios in args.ratios or GRID_RATIOS]
            continue
        found = [(ratios_for(target, pair, num_layers), target) for target in args.reductions]
        ratios_of[pair] = [(ratios, target) for ratios, target in found if ratios is not None]
        unreachable += [
            f"cuts at {pair} are too late for a reduction of {target}"
            for ratios, target in found
            if ratios is None
        ]
    plan = {
        EngineChoice(criterion, *pair): ratios_of[pair]
        for pair in layers
        for criterion in criteria
        if ratios_of[pair]
    }
    if not plan:
        raise CommandError("nothing to measure: " + "; ".join(unreachable))
    return plan, unreachable


def _num_layers(model: str | None) -> int:
    from transformers import AutoConfig

    if model is None:
        from himap_server.bundled import bundled_model

        try:
            model = str(bundled_model().path)
        except ImportError as error:
            raise CommandError(str(error)) from error
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"{model} has no configuration that can be read: {error}") from error
    return int(config.get_text_config().num_hidden_layers)


def _measure(
    args: Namespace,
    engine: EngineChoice,
    planned: Sequence[Ratios],
    items: Sequence[Item],
    cells: Store,
) -> None:
    """Start an engine, ask all questions, and keep the results."""
    flags = [
        *engine_flags({**asdict(engine), "shallow_ratio": 0, "deep_ratio": 0}),
        *(["--enforce-eager"] if args.model is None and not args.flags else args.flags),
    ]
    with serving(args.model, flags, args.output / "server.log") as url:
        model = first_model(url, _KEY)
        endpoint = Endpoint(url, model, _KEY, max_tokens=args.max_tokens, history=args.history)
        settings = list(planned)
        if cells.unpruned is None:
            settings.insert(0, UNPRUNED)
        for ratios in settings:
            answers = ask_all(endpoint, items, [ratios], args.concurrency, args.quiet)[ratios]
            errors = [answer.error for answer in answers if answer.error]
            if errors:
                raise CommandError(f"{len(errors)} requests failed: {errors[0]}; run it again")
            if ratios == UNPRUNED:
                cells.keep_unpruned(answers)
                continue
            assert cells.unpruned is not None
            result = summarize(items, ratios, answers, cells.unpruned)
            scores = scores_of(items, answers)
            cells.keep(Cell(engine, result, scores))


def _about(args: Namespace, items: Sequence[Item]) -> dict[str, Any]:
    """What all cells of one file share."""
    questions = hashlib.sha256()
    for item in items:
        image = str(item.image)
        turn = [item.turn] if item.turn else []
        questions.update(json.dumps([item.question, item.answers, image, *turn]).encode())
    history = {"history": args.history} if any(item.turn for item in items) else {}
    return {
        "model": args.model or "the bundled model",
        "data": data_name(args),
        "num_questions": len(items),
        "num_groups": len({item.group for item in items}),
        "questions": questions.hexdigest(),
        "max_tokens": args.max_tokens,
        "flags": args.flags,
        **history,
    }


class Store:
    """The file of finished cells, one per line; its first line says what they measure.

    Attributes:
        about: the first line.
        unpruned: the unpruned answers; None until they are asked for.
        found: the cells.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.about = about
        self.unpruned: list[Answer] | None = None
        self.found: dict[tuple[EngineChoice, Ratios], Cell] = {}
        self._path = path
        if not path.exists():
            self._append({"about": about})
            return
        # A line without an end was being written when the sweep was interrupted.
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        path.write_text(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._append({"about": about})
        elif lines[0]["about"] != about:
            raise CommandError(
                f"{path} is of another model, data set or flags; name another --output"
            )
        for line in lines[1:]:
            if "unpruned" in line:
                self.unpruned = _ANSWERS.validate_python(line["unpruned"])
            else:
                cell = _CELL.validate_python(line["cell"])
                self.found[cell.engine, cell.result.ratios] = cell

    def keep_unpruned(self, answers: list[Answer]) -> None:
        """Add the answers that all cells are compared with."""
        self.unpruned = answers
        self._append({"unpruned": [asdict(answer) for answer in answers]})

    def keep(self, cell: Cell) -> None:
        """Add a cell."""
        self.found[cell.engine, cell.result.ratios] = cell
        self._append({"cell": asdict(cell)})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
