# SPDX-License-Identifier: Apache-2.0
"""`himap eval`: accuracy of a served model, pruned and not."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
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
    parser.add_argument(
        "--url",
        default=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        help="URL of the API, up to /v1 (default: OPENAI_BASE_URL, or http://localhost:8000/v1); "
        "the key is OPENAI_API_KEY",
    )
    parser.add_argument("--model", help="name at the server (default: the server's first model)")
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


def _run(args: Namespace) -> int:
    items = load_items(args)
    key = os.environ.get("OPENAI_API_KEY", "none")
    model = args.model or first_model(args.url, key)
    endpoint = Endpoint(args.url, model, key, args.xargs, args.max_tokens)
    settings = list(dict.fromkeys([UNPRUNED, *(args.ratios or _DEFAULT_RATIOS)]))
    answers = ask_all(endpoint, items, settings, args.concurrency, args.quiet)
    usable = answered(items, answers)
    if not usable:
        raise CommandError(f"no request went through: {answers[UNPRUNED][0].error}")
    kept_items = [items[i] for i in usable]
    kept = {ratios: [row[i] for i in usable] for ratios, row in answers.items()}
    results = [summarize(kept_items, ratios, kept[ratios], kept[UNPRUNED]) for ratios in settings]
    args.output.mkdir(parents=True, exist_ok=True)
    about = {
        "model": model,
        "data": data_name(args),
        "num_questions": len(kept_items),
        "num_groups": len({item.group for item in kept_items}),
        "num_failed": len(items) - len(usable),
        "concurrency": args.concurrency,
    }
    _write(args, about, results)
    _write_answers(args.output / "answers.jsonl", items, answers)
    print(f"\n{settings_table(results)}\n\n{kinds_table(results)}\n\nin {args.output}/")
    return _status(args, items, answers, results)


def _status(
    args: Namespace,
    items: Sequence[Item],
    answers: dict[Ratios, list[Answer]],
    results: Sequence[Result],
) -> int:
    errors = [answer.error for row in answers.values() for answer in row if answer.error]
    if errors:
        text = f"{len(errors)} of {len(items) * len(answers)} requests failed: {errors[0]}"
        print(f"himap eval: {text}", file=sys.stderr)
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
    return int(bool(errors or low))


def _write(args: Namespace, about: dict[str, Any], results: Sequence[Result]) -> None:
    summary = {**about, "settings": [result.as_dict() for result in results]}
    (args.output / "results.json").write_text(to_json(summary))
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
    if pruned and not args.no_plot:
        points = [
            Point(result.savings.prefill_flops, result.retention, str(result.ratios))
            for result in pruned
            if result.savings
        ]
        cost = "prefill FLOPs (% of unpruned)"
        scatter(args.output / "retention.png", {str(about["model"]): {"pruned": points}}, cost)
        lines.append("![Retention against prefill FLOPs](retention.png)")
    (args.output / "results.md").write_text("\n\n".join(lines) + "\n")


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
