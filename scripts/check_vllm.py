# SPDX-License-Identifier: Apache-2.0
"""Checks what the project relies on against the sources of a vLLM release, without importing it.

`python -m scripts.check_vllm 0.33.0` reads every import of vLLM in the product and every symbol of
the register (docs/seams.md) and prints a line for each that

* does not exist;
* has another signature, body or set of callers than the one that somebody has read and recorded
  in `scripts/known_vllm.json`;
* is a method that the product overrides by one that does not take the same arguments.

It exits with 1 if there is such a line. `--accept` records the release as read: use it when every
line has been looked at in vLLM's source, and the project mended where it had to be
(CONTRIBUTING.md, "New vLLM minor"). `--against 0.32.0` prints what changed since another release.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from himap_vllm.vllm_versions import MOVED
from scripts.overrides import misfits
from scripts.seams import ROOT, Seam, read_seams
from scripts.vllm_sources import Sources, fetch

KNOWN = Path(__file__).parent / "known_vllm.json"
PRODUCT = ("himap_vllm", "server", "evaluation")
# The one module that knows what differs between minors: a name may exist in one of them only.
DIFFERENCES = "himap_vllm/vllm_versions.py"
# vLLM calls these: who does, and when, is part of what the project relies on.
_HOOKS = ("overridden", "wrapped")
# Called by so many that callers say nothing.
_COMMON = {"__init__", "forward", "build"}


class Record(TypedDict):
    """What was read of one symbol."""

    signature: str
    digest: str
    callers: list[str]


def imports(root: Path) -> Iterator[tuple[str, str]]:
    """Pairs of (file, dotted name imported from vLLM) of the product."""
    for folder in PRODUCT:
        for file in sorted((root / folder).rglob("*.py")):
            name = str(file.relative_to(root))
            if name == DIFFERENCES or ".venv" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                else:
                    continue
                for imported in names:
                    if imported.split(".")[0] == "vllm":
                        yield name, imported


def record(sources: Sources, seams: dict[str, Seam]) -> dict[str, Record]:
    """What a release has of the register's symbols; one that it lacks is left out."""
    found = {name: symbol for name in sorted(seams) if (symbol := sources.resolve(name))}
    hooks = {name: name.rpartition(".")[2] for name in found if seams[name].how in _HOOKS}
    callers = sources.callers(set(hooks.values()) - _COMMON)
    return {
        name: Record(
            signature=symbol.signature,
            digest=symbol.digest,
            callers=sorted(callers.get(hooks.get(name, ""), ())),
        )
        for name, symbol in found.items()
    }


def differences(
    seams: dict[str, Seam], now: dict[str, Record], known: dict[str, Record]
) -> list[str]:
    """A line for each symbol that is not as it is known."""
    lines = []
    for name, seam in sorted(seams.items()):
        file = seam.file
        if name not in now:
            lines.append(f"MISSING    {name} ({file})")
        elif name not in known:
            lines.append(f"UNREAD     {name} ({file})")
        else:
            old, new = known[name], now[name]
            if old["signature"] != new["signature"]:
                lines.append(
                    f"SIGNATURE  {name} ({file})\n    {old['signature']}\n    {new['signature']}"
                )
            elif old["digest"] != new["digest"]:
                lines.append(f"BODY       {name} ({file})")
            gone = sorted(set(old["callers"]) - set(new["callers"]))
            more = sorted(set(new["callers"]) - set(old["callers"]))
            if gone or more:
                changes = [f"    - {place}" for place in gone] + [
                    f"    + {place}" for place in more
                ]
                lines.append("\n".join([f"CALLERS    {name} ({file})", *changes]))
    return lines


def check(sources: Sources, known: dict[str, Record], root: Path = ROOT) -> list[str]:
    """Lines for all that is not as known, imports included; empty: the release fits."""
    seams = register(root)
    missing = [
        f"IMPORT     {name} ({file})"
        for file, name in imports(root)
        if sources.resolve(name) is None
    ]
    return [
        *sorted(set(missing)),
        *misfits(sources, root, PRODUCT),
        *differences(seams, record(sources, seams), known),
    ]


def register(root: Path = ROOT) -> dict[str, Seam]:
    """The register's symbols inside vLLM, each with a note that names it; one of a hook first."""
    notes = sorted(read_seams(root), key=lambda seam: seam.how in _HOOKS)
    return {name: seam for seam in notes for name in seam.symbols if name.startswith("vllm.")}


def lost(sources: Sources) -> list[str]:
    """Lines for the names that `DIFFERENCES` imports and that are in none of their places."""
    return [
        f"IMPORT     {name} ({DIFFERENCES})"
        for name, places in sorted(MOVED.items())
        if not any(sources.resolve(f"{place}.{name}") for place in places)
    ]


def load_known() -> dict[str, dict[str, Record]]:
    """What was read, by release and symbol."""
    known: dict[str, dict[str, Record]] = json.loads(KNOWN.read_text())
    return known


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="check_vllm", description=__doc__.split("\n")[0])
    parser.add_argument("version", help="of vLLM, as on PyPI")
    parser.add_argument("--accept", action="store_true", help="record the release as read")
    parser.add_argument("--against", metavar="VERSION", help="compare with this release instead")
    args = parser.parse_args(argv)
    known = load_known()
    sources = Sources(fetch(args.version))
    if args.accept:
        known[args.version] = record(sources, register())
        KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    lines = lost(sources) + check(sources, known.get(args.against or args.version, {}))
    print("\n".join(lines) or f"vLLM {args.version}: all that is relied on is as it was read")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
