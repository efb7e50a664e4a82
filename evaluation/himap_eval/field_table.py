# SPDX-License-Identifier: Apache-2.0
"""`himap table`: a served model at the budgets that papers report, beside their published rows."""

from __future__ import annotations

import csv
import statistics
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from himap_vllm.plan.prompt import Ratios

from .client import UNPRUNED, Endpoint, ask_all
from .errors import CommandError
from .evaluate import add_endpoint_options, endpoint_of, measure
from .formats import FORMATS, read
from .items import Item
from .options import add_asking_options, guarded, prepared
from .pareto import ratios_for
from .results import Result
from .tables import interval, markdown_table, percent, to_json

_BUDGETS = (192, 144, 128, 64)
_OF = 576
_PROBES = (Ratios(0.5, 0.0), Ratios(0.0, 0.5))


@dataclass(frozen=True, slots=True)
class DataSet:
    """One `--set`.

    Attributes:
        name: of its column and folder.
        data_format: a name in `FORMATS`.
        path: file or folder.
        images: folder of the images; None: beside the file.
    """

    name: str
    data_format: str
    path: Path
    images: Path | None


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a running server prunes."""

    shallow: int
    deep: int
    num_layers: int


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    models = list(dict.fromkeys(row["model"] for row in published()))
    parser = ArgumentParser(
        prog="himap table",
        description="Retention at 192, 144, 128 and 64 of 576 image tokens (mean over the "
        "layers), beside published rows. The server's cuts are asked for; ratios follow from them.",
    )
    parser.add_argument("rows", choices=models, help="whose published rows are printed")
    parser.add_argument(
        "--set", dest="sets", type=_data_set, action="append", required=True,
        metavar="FORMAT=FILE[,IMAGES]",
        help="a data set, such as pope=coco_pope,val2014; repeatable",
    )  # fmt: skip
    add_endpoint_options(parser)
    parser.add_argument(
        "--budgets", type=_budgets, default=_BUDGETS, metavar="TOKENS,...",
        help="of 576, averaged over the layers (default: 192,144,128,64)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("himap-table"), help="folder (default: himap-table)"
    )
    add_asking_options(parser.add_argument_group("questions"))
    return guarded("table", _run, parser.parse_args(argv))


def _budgets(words: str) -> list[int]:
    budgets = [int(part) if part.isdecimal() else 0 for part in words.split(",")]
    if not all(0 < budget < _OF for budget in budgets):
        raise ArgumentTypeError(f"must be whole numbers from 1 to {_OF - 1}, got {words!r}")
    return list(dict.fromkeys(budgets))


def _data_set(words: str) -> DataSet:
    data_format, equals, files = words.partition("=")
    path, _, images = files.partition(",")
    if not equals or data_format not in FORMATS or not path:
        formats = ", ".join(FORMATS)
        raise ArgumentTypeError(
            f"must be FORMAT=FILE or FORMAT=FILE,IMAGES with a FORMAT of {formats}; got {words!r}"
        )
    name = f"{data_format}-{Path(path).stem}" if data_format == "jsonl" else data_format
    return DataSet(name, data_format, Path(path), Path(images) if images else None)


def _run(args: Namespace) -> int:
    items_of = _load(args)
    endpoint, some = endpoint_of(args), next(iter(items_of.values()))[0]
    cuts = probe(endpoint, some)
    ratios_of = choose_ratios(endpoint, some, cuts, args.budgets)
    settings = [UNPRUNED, *(ratios for ratios in ratios_of.values() if ratios is not None)]
    results_of, failed = {}, 0
    for own, items in items_of.items():
        folder = args.output / own.name
        about = f"{own.path.name} ({own.data_format})"
        results, errors = measure(args, endpoint, items, settings, folder, about)
        results_of[own.name] = results
        failed += errors
    lines = [
        f"# {endpoint.model} beside published rows of {args.rows}",
        f"The server prunes at ({cuts.shallow}, {cuts.deep}) of {cuts.num_layers} layers. A budget "
        "is the mean number of image tokens over the layers, of LLaVA-1.5's 576; for other models "
        "it is the same share. Retention is averaged over the data sets.",
        _comparison(args.rows, ratios_of, results_of),
        "Papers differ in data sets and protocols: compare rows of one source. A method that cuts "
        "before the decoder has the budget in every layer; one that cuts inside, as its paper "
        "counts, mostly the mean over the layers.",
        "## Retention by data set (95 % interval)",
        _by_data_set(ratios_of, results_of),
    ]
    text = "\n\n".join(lines)
    (args.output / "table.md").write_text(text + "\n")
    values = {
        "model": endpoint.model, "cuts": [cuts.shallow, cuts.deep], "num_layers": cuts.num_layers,
        "ratios": {budget: own and asdict(own) for budget, own in ratios_of.items()},
        "data_sets": {name: [own.as_dict() for own in found] for name, found in results_of.items()},
    }  # fmt: skip
    (args.output / "table.json").write_text(to_json(values))
    print(f"\n{text}\n\nin {args.output}/")
    return int(failed > 0)


def _load(args: Namespace) -> dict[DataSet, list[Item]]:
    names = [own.name for own in args.sets]
    if len(set(names)) < len(names):
        raise CommandError(f"--set names a data set twice: {', '.join(names)}")
    return {own: prepared(read(own.data_format, own.path, own.images), args) for own in args.sets}


def probe(endpoint: Endpoint, item: Item) -> Cuts:
    """The cuts of a running server, from what it reports of two requests.

    A cut that drops d tokens before layer K of L saves d (L - K) KV entries.

    Raises:
        CommandError: a request fails, or the server reports no savings.
    """
    found = []
    for (answer,) in ask_all(endpoint, [item], _PROBES, concurrency=1, quiet=True).values():
        if answer.error:
            raise CommandError(f"the first question failed: {answer.error}")
        usage = answer.usage
        if usage is None or usage["kept_deep"] == usage["image_tokens"]:
            raise CommandError("the server reports nothing pruned; it must be `himap serve`")
        num_layers = usage["kv_tokens_unpruned"] // answer.prompt_tokens
        saved = usage["kv_tokens_unpruned"] - usage["kv_tokens"]
        found.append(num_layers - saved // (usage["image_tokens"] - usage["kept_deep"]))
    return Cuts(found[0], found[1], num_layers)


def choose_ratios(
    endpoint: Endpoint, item: Item, cuts: Cuts, budgets: Sequence[int]
) -> dict[int, Ratios | None]:
    """The ratios that reach each budget; None if the cuts are too late for it.

    Raises:
        CommandError: the server does not admit them.
    """
    layers = (cuts.shallow, cuts.deep)
    found = {own: ratios_for(1 - own / _OF, layers, cuts.num_layers) for own in budgets}
    settings = [ratios for ratios in found.values() if ratios is not None]
    for ratios, (answer,) in ask_all(endpoint, [item], settings, 1, quiet=True).items():
        if answer.error:
            raise CommandError(
                f"the server refuses the ratios {ratios}; --budgets without them, or a server with "
                f"larger --max-shallow-ratio and --max-deep-ratio, would do: {answer.error}"
            )
    return found


def published() -> list[dict[str, str]]:
    """The published rows: retention in percent by budget, and where it comes from."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _comparison(
    model: str, ratios_of: Mapping[int, Ratios | None], results_of: Mapping[str, Sequence[Result]]
) -> str:
    head = ["method", "cut in", *map(_heading, ratios_of), "data sets", "source"]
    means = []
    for ratios in ratios_of.values():
        found = [_at(ratios, results) for results in results_of.values()]
        shares = [result.retention.value for result in found if result is not None]
        means.append(f"**{percent(statistics.fmean(shares))}**" if shares else "cuts too late")
    rows = [["**this server**", "decoder", *means, str(len(results_of)), "this run"]]
    for row in published():
        if row["model"] == model:
            own = [row.get(str(budget)) for budget in ratios_of]
            cells = [f"{share} %" if share else "-" for share in own]
            sets = row["benchmarks"] or "-"
            rows.append([row["method"], row["cut"], *cells, sets, row["source"]])
    return markdown_table(head, rows)


def _by_data_set(
    ratios_of: Mapping[int, Ratios | None], results_of: Mapping[str, Sequence[Result]]
) -> str:
    head = ["data set", "unpruned accuracy"]
    head += [f"{_heading(budget)} at {ratios}" for budget, ratios in ratios_of.items() if ratios]
    rows = []
    for name, results in results_of.items():
        row = [name, percent(results[0].accuracy)]
        rows.append([*row, *(interval(result.retention) for result in results[1:])])
    return markdown_table(head, rows)


def _at(ratios: Ratios | None, results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.ratios == ratios), None)


def _heading(budget: int) -> str:
    return f"{budget} ({percent(budget / _OF)})"
