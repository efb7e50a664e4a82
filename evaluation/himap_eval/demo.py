# SPDX-License-Identifier: Apache-2.0
"""`himap demo`: example scenes, questions, and the answers at several ratios side by side."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from argparse import ArgumentParser, Namespace
from pathlib import Path

from himap_vllm.plan.prompt import Ratios

from .client import UNPRUNED, Endpoint, ask_all, first_model
from .errors import CommandError
from .items import held_out
from .local_server import serving
from .options import guarded, positive, ratio_pair
from .results import answered, scores_of, summarize
from .tables import percent

_RATIOS = (Ratios(0.25, 0.5), Ratios(0.5, 0.75), Ratios(0.75, 0.9))
_QUESTION_WIDTH, _ANSWER_WIDTH = 40, 20
_WRONG = " (wrong)"


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = ArgumentParser(
        prog="himap demo",
        description="Ask the bundled model about example scenes, pruned and not.",
    )
    parser.add_argument("--url", help="a running server, up to /v1, instead of starting one")
    parser.add_argument("--scenes", type=positive, default=3, help="default: 3")
    parser.add_argument(
        "--ratios", type=ratio_pair, action="append", metavar="SHALLOW,DEEP",
        help=f"repeatable (default: {', '.join(map(str, _RATIOS))})",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="write the scenes to this folder"
    )
    return guarded("demo", _run, parser.parse_args(argv))


def _run(args: Namespace) -> int:
    if args.url:
        return _show(args, args.url)
    # Imported here, because --url needs no engine.
    from himap_server.bundled import bundled_model

    print(
        "Starting `himap serve` with the bundled model. This takes about a minute.\n"
        f"Its settings: {json.dumps(bundled_model().engine)}",
        flush=True,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(None, ["--enforce-eager"], Path(folder) / "server.log") as url,
    ):
        return _show(args, url)


def _show(args: Namespace, url: str) -> int:
    items, pictures = held_out(args.scenes)
    key = os.environ.get("OPENAI_API_KEY", "none")
    endpoint = Endpoint(url, first_model(url, key), key)
    settings = list(dict.fromkeys([UNPRUNED, *(args.ratios or _RATIOS)]))
    answers = ask_all(endpoint, items, settings, concurrency=4, quiet=True)
    if len(answered(items, answers)) < len(items):
        errors = [answer.error for row in answers.values() for answer in row if answer.error]
        raise CommandError(f"a request failed: {errors[0]}")
    names = ["unpruned", *map(str, settings[1:])]
    print(_line("", *names))
    scores = {ratios: scores_of(items, answers[ratios]) for ratios in settings}
    for index, item in enumerate(items):
        if index == 0 or item.group != items[index - 1].group:
            print(f"\nscene {item.group}")
        cells = [
            _short(answers[ratios][index].text)
            if scores[ratios][index]
            else f"{_short(answers[ratios][index].text, len(_WRONG))}{_WRONG}"
            for ratios in settings
        ]
        print(_line(item.question, *cells))
    results = [summarize(items, ratios, answers[ratios], answers[UNPRUNED]) for ratios in settings]
    saved = [result.savings for result in results]
    print()
    rows = {
        "right answers": [f"{sum(map(bool, scores[r]))} of {len(items)}" for r in settings],
        "image tokens after the cuts": [s.kept if s else "-" for s in saved],
    }
    for place, name in enumerate(("image tokens, all layers", "KV cache", "prefill FLOPs")):
        rows[name] = [percent(s.shares[place], 0) if s else "-" for s in saved]
    for name, cells in rows.items():
        print(_line(name, *cells))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture.save(args.pictures / f"scene-{name}.png")
        print(f"\nThe scenes are in {args.pictures}/.")
    return 0


def _line(question: str, *cells: str) -> str:
    first = textwrap.shorten(question, _QUESTION_WIDTH, placeholder="...")
    parts = [f"{first:{_QUESTION_WIDTH}}", *(f"{cell:{_ANSWER_WIDTH}}" for cell in cells)]
    return " ".join(parts).rstrip()


def _short(text: str, room: int = 0) -> str:
    """`text` shortened to a cell, with `room` characters left."""
    return textwrap.shorten(text, _ANSWER_WIDTH - room, placeholder="...")
