# SPDX-License-Identifier: Apache-2.0
"""Refuses wrong settings before vLLM is imported, which takes ten seconds and more.

`serve.parse_arguments` reads the same arguments again, with vLLM's own flags.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from himap_vllm.config import EngineSettings, HiMAPError

from .security.keys import KeyFileError, read_keys
from .settings import SettingsError, add_flags, load, setting_names, split_file

_ENDS_AT_ONCE = ("--help", "-h", "--version", "-v")


def check(argv: list[str]) -> None:
    """Check the flags, environment variables and files that need no vLLM to be understood.

    Raises:
        SystemExit: something is wrong, as argparse does.
    """
    if any(argument.startswith(_ENDS_AT_ONCE) for argument in argv):
        return
    parser = ArgumentParser(
        prog="himap serve", usage="%(prog)s --help", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path)
    add_flags(parser)
    args, _ = parser.parse_known_args([_dashed(argument) for argument in argv])
    if args.config is not None and _can_be_read_once(args.config):
        return
    try:
        file = {} if args.config is None else split_file(args.config)[0]
        settings, engine = load({name: getattr(args, name) for name in setting_names()}, file)
        # Without a model, the bundled one's settings come first, and change what is in range.
        known = None
        if argv and not argv[0].startswith("-"):
            known = EngineSettings.parse(engine)
        if settings.api_keys_file is not None and not _can_be_read_once(settings.api_keys_file):
            read_keys(settings.api_keys_file, known)
    except KeyFileError as error:
        parser.error(f"api-keys-file: {error}")
    except (SettingsError, HiMAPError) as error:
        parser.error(str(error))


def _can_be_read_once(file: Path) -> bool:
    """Whether it is a pipe, such as a shell's `<(command)`: what is read here is lost there."""
    return file.exists() and not file.is_file()


def _dashed(argument: str) -> str:
    """A flag as vLLM's parser reads it: `--max_images` is `--max-images`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
