# SPDX-License-Identifier: Apache-2.0
"""The `himap` command. Each subcommand imports its modules when called: vLLM takes seconds."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable

_USAGE = """\
usage: himap serve [MODEL] [any vllm serve flag]   serve a model with an OpenAI API;
                                                  without MODEL, the small bundled one
       himap demo                                 ask that model about pictures, pruned and not
       himap eval                                 measure a served model's accuracy, pruned and not
       himap table llava-1.5-7b                   the same beside published rows of a model
       himap sweep [MODEL]                        find where to prune, and how much
       himap analyze [MODEL]                      see where it reads its images, and where to cut
       himap calibrate [MODEL]                    measure the positional prior of its attention
       himap key NAME                             make an API key
Every command takes --help.
"""


def _serve(argv: list[str]) -> int:
    from .preflight import check

    check(argv)
    from .serve import main

    return main(argv)


def _demo(argv: list[str]) -> int:
    from himap_eval.demo import main

    return int(main(argv))


def _eval(argv: list[str]) -> int:
    from himap_eval.evaluate import main

    return int(main(argv))


def _table(argv: list[str]) -> int:
    from himap_eval.field_table import main

    return int(main(argv))


def _sweep(argv: list[str]) -> int:
    from himap_eval.sweep import main

    return int(main(argv))


def _analyze(argv: list[str]) -> int:
    from himap_eval.analyze import main

    return int(main(argv))


def _calibrate(argv: list[str]) -> int:
    from himap_eval.calibrate import main

    return int(main(argv))


def _key(argv: list[str]) -> int:
    from .security.keys import make_key

    parser = ArgumentParser(
        prog="himap key", description="Make an API key and its entry for --api-keys-file."
    )
    parser.add_argument("name", help="name of the key in logs and metrics: letters, digits and ._-")
    try:
        token, entry = make_key(parser.parse_args(argv).name)
    except ValueError:
        parser.error("NAME must be 1 to 64 letters, digits, dots, dashes or underscores")
    print(f"# The key, shown only now: {token}\n# In the file, below `keys:`\n{entry}", end="")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "demo": _demo,
    "eval": _eval,
    "table": _table,
    "sweep": _sweep,
    "analyze": _analyze,
    "calibrate": _calibrate,
    "key": _key,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `himap` command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]](argv[1:])
    asked = argv[:1] in (["--help"], ["-h"])
    print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
