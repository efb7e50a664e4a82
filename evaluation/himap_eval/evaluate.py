# SPDX-License-Identifier: Apache-2.0
"""`himap eval`: accuracy of a served model, pruned and not."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from himap_vllm.plan.prompt import Ratios

from .client import UNPRUNED, Answer, Endpoint, ask_all, first_model
from .errors import CommandError
from .items import Item
from .options import (
    add_data_options,
    data_name,
    guarded,
    load_items,
    ratio_pair,
)
from .plot import Point, scatter
from .results import Result, answered, scores_of, summarize
from .tables import kinds_table, settings_table, to_json

_DEFAULT_RATIOS = (Ratios(0.5, 0.75),)


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = ArgumentParser(
        prog="himap eval",
        description="Accuracy of a served model, pruned at each of the ratios and unpruned.",
        epilog="Exit status: 1 if a request failed or a retention is below --min-retention.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_endpoint_options(parser)
    parser.add_argument(
        "--ratios", type=ratio_pair, action="append", metavar="SHALLOW,DEEP",
        help="repeatable (default: 0.5,0.75)",
    )  # fmt: skip
    parser.add_argument(
        "--xargs", action="store_true",
        help="the server is a plain `vllm serve`: send ratios as vllm_xargs",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("himap-eval"), help="folder (default: himap-eval)"
    )
    parser.add_argument(
        "--min-retention", type=float, metavar="SHARE",
        help="fail if a retention is lower, for example 0.95; for CI",
    )  # fmt: skip
    add_data_options(parser)
    return guarded("eval", _run, parser.parse_args(argv))


def add_endpoint_options(parser: ArgumentParser) -> None:
    """Add the options that name a served model."""
    parser.add_argument(
        "--url",
        default=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        help="URL of the API, up to /v1 (default: OPENAI_BASE_URL, or http://localhost:8000/v1); "
        "the key is OPENAI_API_KEY",
    )
    parser.add_argument("--model", help="name at the server (default: the server's first model)")


def endpoint_of(args: Namespace) -> Endpoint:
    """The served model that the options name.

    Raises:
        CommandError: there is no model, or the server does not answer.
    """
    key = os.environ.get("OPENAI_API_KEY", "none")
    model = args.model or first_model(args.url, key)
    return Endpoint(args.url, model, key, max_tokens=args.max_tokens, history=args.history)


def _run(args: Namespace) -> int:
    items = load_items(args)
    endpoint = replace(endpoint_of(args), xargs=args.xargs)
    settings = list(dict.fromkeys([UNPRUNED, *(args.ratios or _DEFAULT_RATIOS)]))
    results, failed = measure(args, endpoint, items, settings, args.output, data_name(args))
    print(f"\n{settings_table(results)}\n\n{kinds_table(results)}\n\nin {args.output}/")
    low = _too_low(args, results)
    return int(failed > 0 or low)


def measure(
    args: Namespace,
    endpoint: Endpoint,
    items: Sequence[Item],
    settings: Sequence[Ratios],
    folder: Path,
    data: str,
) -> tuple[list[Result], int]:
    """Ask all questions at all settings, and write results and answers.

    Args:
        args: options of `add_asking_options`.
        endpoint: the served model.
        items: the questions.
        settings: ratios; the first are `UNPRUNED`.
        folder: where results are written.
        data: name of the data, for the report.

    Returns:
        The results of the settings, and how many requests failed.

    Raises:
        CommandError: no question has an answer at every setting.
    """
    answers = ask_all(endpoint, items, settings, args.concurrency, args.quiet)
    usable = answered(items, answers)
    if not usable:
        raise CommandError(f"no request went through: {answers[UNPRUNED][0].error}")
    kept_items = [items[i] for i in usable]
    kept = {ratios: [row[i] for i in usable] for ratios, row in answers.items()}
    results = [summarize(kept_items, ratios, kept[ratios], kept[UNPRUNED]) for ratios in settings]
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": endpoint.model,
        "data": data,
        "num_questions": len(kept_items),
        "num_groups": len({item.group for item in kept_items}),
        "num_failed": len(items) - len(usable),
        "concurrency": args.concurrency,
    }
    _write(folder, about, results, draw=not args.no_plot)
    _write_answers(folder / "answers.jsonl", items, answers)
    errors = [answer.error for row in answers.values() for answer in row if answer.error]
    if errors:
        text = f"{len(errors)} of {len(items) * len(answers)} requests failed: {errors[0]}"
        print(f"{data}: {text}", file=sys.stderr)
    return results, len(errors)


def _too_low(args: Namespace, results: Sequence[Result]) -> bool:
    low = [
        result
        for result in results
        if args.min_retention is not None and not result.retention.value >= args.min_retention
    ]
    for result in low:
        print(
            f"himap eval: retention at {result.ratios} is {result.retention.value:.3f}, below "
            f"{args.min_retention}",
            file=sys.stderr,
        )
    return bool(low)


def _write(folder: Path, about: dict[str, Any], results: Sequence[Result], draw: bool) -> None:
    summary = {**about, "settings": [result.as_dict() for result in results]}
    (folder / "results.json").write_text(to_json(summary))
    lines = [
        "# Accuracy under pruning",
        f"{about['model']}, {about['data']}: {about['num_questions']} questions in "
        f"{about['num_groups']} groups; {about['num_failed']} left out because a request failed.",
        settings_table(results),
        "Retention: accuracy as a share of the unpruned one; 95 % interval by a paired bootstrap "
        "over groups. Image token-layers, KV tokens, prefill FLOPs: what is left of them. Times "
        f"are medians at {about['concurrency']} requests at once, of this run.",
        "## Accuracy by kind of question",
        kinds_table(results),
    ]
    pruned = [result for result in results if result.savings and result.ratios != UNPRUNED]
    if pruned and draw:
        points = [
            Point(result.savings.prefill_flops, result.retention, str(result.ratios))
            for result in pruned
            if result.savings
        ]
        cost = "prefill FLOPs (% of unpruned)"
        scatter(folder / "retention.png", {str(about["model"]): {"pruned": points}}, cost)
        lines.append("![Retention against prefill FLOPs](retention.png)")
    (folder / "results.md").write_text("\n\n".join(lines) + "\n")


def _write_answers(path: Path, items: Sequence[Item], answers: dict[Ratios, list[Answer]]) -> None:
    """Write every answer, to see what pruning changed."""
    scores = {ratios: scores_of(items, row) for ratios, row in answers.items()}
    with path.open("w") as file:
        for index, item in enumerate(items):
            line = {
                "question": item.question,
                "accepted": item.answers,
                "kind": item.kind,
                "group": item.group,
                "answers": [
                    {
                        "shallow_ratio": ratios.shallow,
                        "deep_ratio": ratios.deep,
                        "answer": row[index].text,
                        "score": scores[ratios][index],
                        "error": row[index].error,
                    }
                    for ratios, row in answers.items()
                ],
            }
            file.write(json.dumps(line) + "\n")
