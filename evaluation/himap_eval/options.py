# SPDX-License-Identifier: Apache-2.0
"""Command-line options that the commands share."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from himap_vllm.config import check_ratio
from himap_vllm.plan.prompt import Ratios

from .client import HISTORIES
from .errors import CommandError
from .formats import FORMATS, read
from .items import DataError, Item, check_images, held_out, in_conversations, sample
from .plot import PlotError, check_matplotlib


def ratio(text: str) -> float:
    """A ratio in [0, 1), for argparse."""
    try:
        return check_ratio("ratio", float(text))
    except ValueError as error:
        raise ArgumentTypeError(f"must be a ratio in [0, 1), got {text!r}") from error


def ratio_pair(text: str) -> Ratios:
    """`0.5,0.75`, for argparse."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ArgumentTypeError(f"must be SHALLOW,DEEP such as 0.5,0.75, got {text!r}")
    return Ratios(ratio(parts[0]), ratio(parts[1]))


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 or above, for argparse."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be a whole number, 0 or above, got {text!r}")
    return int(text)


def layer_pair(text: str) -> tuple[int, int]:
    """`2,8`, for argparse."""
    try:
        shallow, deep = map(int, text.split(","))
    except ValueError:
        shallow = deep = 0
    if not 0 < shallow < deep:
        raise ArgumentTypeError(f"must be K1,K2 with 0 < K1 < K2, such as 2,8, got {text!r}")
    return shallow, deep


def engine_parser(name: str, flags_of: str, description: str) -> ArgumentParser:
    """The parser of a command that starts engines. `parse` parses its command line.

    Args:
        name: of the command.
        flags_of: whose flags follow `--`.
        description: of the command.
    """
    parser = ArgumentParser(
        prog=f"himap {name}",
        usage=f"%(prog)s [MODEL] [options] [-- flags of {flags_of}]",
        description=description,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the bundled model")
    return parser


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse a command line. `flags` are what follows `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1 :]
    return args


def add_files(group: Any) -> None:
    """Add the options that name files with questions to a group of a parser."""
    group.add_argument("--data", type=Path, help="file or folder, see --format")
    group.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
    group.add_argument("--images", type=Path, help="folder of the images, if it is another one")


def add_data_options(parser: ArgumentParser) -> None:
    """Add the options that choose the questions and how they are asked."""
    group = parser.add_argument_group("data (default: the project's own held-out set)")
    add_files(group)
    group.add_argument(
        "--num-scenes", type=positive, default=250, help="scenes of the held-out set (default: 250)"
    )
    group.add_argument(
        "--first-scene", type=natural, default=0, metavar="N",
        help="first scene of the held-out set (default: 0)",
    )  # fmt: skip
    add_asking_options(group)


def add_asking_options(group: Any) -> None:
    """Add the options that say how questions are asked to a group of a parser."""
    group.add_argument("--limit", type=positive, help="ask a sample of at most this many questions")
    group.add_argument(
        "--turns", type=positive, default=1, metavar="N",
        help="ask the questions about an image in conversations of N (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--history", choices=HISTORIES, default=HISTORIES[0],
        help="answers in a conversation: the model's own, or the first accepted one (default: own)",
    )  # fmt: skip
    group.add_argument(
        "--concurrency", type=positive, default=8, help="requests at once (default: 8)"
    )
    group.add_argument(
        "--max-tokens", type=positive, default=64, help="longest answer (default: 64)"
    )
    group.add_argument("--no-plot", action="store_true", help="do not plot; plots need matplotlib")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def load_items(args: Namespace) -> list[Item]:
    """The questions that the options name.

    Raises:
        DataError: there are no questions, or they can't be read.
    """
    if args.data is None:
        items, _ = held_out(args.num_scenes, args.first_scene)
    else:
        items = read(args.format, args.data, args.images)
    return prepared(items, args)


def prepared(items: list[Item], args: Namespace) -> list[Item]:
    """The questions that are asked: conversations if wanted, a sample, with images that exist.

    Raises:
        DataError: an image is missing, or there are no such conversations.
    """
    if args.turns > 1:
        items = in_conversations(items, args.turns)
    items = sample(items, args.limit)
    check_images(items)
    return items


def data_name(args: Namespace) -> str:
    """Name of the data, for reports."""
    if args.data is None:
        scenes = f"{args.num_scenes} scenes"
        if args.first_scene:
            scenes += f" from number {args.first_scene} on"
        return f"the project's held-out set, {scenes}"
    return f"{args.data.name} ({args.format})"


def guarded(name: str, run: Callable[[Namespace], int], args: Namespace) -> int:
    """Run a command. An error that the user can correct becomes one line and status 2."""
    try:
        if not getattr(args, "no_plot", True):
            check_matplotlib()
        return run(args)
    except (DataError, PlotError, CommandError) as error:
        print(f"himap {name}: {error}", file=sys.stderr)
        return 2
