# SPDX-License-Identifier: Apache-2.0
"""The register of seams: what the product relies on inside vLLM and other packages.

`python -m scripts.seams` writes `docs/seams.md` from the seam notes in docstrings and comments.
Such a note is a list item or a paragraph:

    * `vllm.dotted.path.Class.method` (overridden): why it is needed. Remove when: condition.

Several symbols are separated by commas, each or the last with one of `HOW`. Names outside vLLM
(`uvicorn.Config`) are noted in the same way.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGISTER = ROOT / "docs" / "seams.md"
PRODUCT = ("himap_vllm", "server/himap_server", "evaluation/himap_eval", "demo/himap_demo")
HOW = ("overridden", "wrapped", "subclassed", "called", "read")
MARK = "Remove when:"

_NAME = r"`[A-Za-z_][\w.]*`"
_NOTE = re.compile(rf"((?:(?:{_NAME},? )+\(\w+\)(?:, )?)+): (.+?) {MARK} (.+)\.")
# Words that notes had before there was one form, and the start of a note that lacks its end.
_STRAY = re.compile(
    rf"(?i)\bcan go\b[^.]{{0,30}} (when|with|once)\b|\bgoes (away )?(when|with)\b|\bvllm seams?\b"
    rf"|^{_NAME}(, {_NAME})* \((?:{'|'.join(HOW)})\)"
)


@dataclass(frozen=True, slots=True)
class Seam:
    """One note.

    Attributes:
        file: that relies on the symbols, relative to the root of the project.
        symbols: fully qualified.
        how: of `HOW`, one for all symbols or one for each.
        why: what they are needed for.
        remove_when: what must be so for the note and its code to go.
    """

    file: str
    symbols: tuple[str, ...]
    how: str
    why: str
    remove_when: str


class SeamNoteError(ValueError):
    """A note that is not in the form above."""


def read_seams(root: Path = ROOT) -> list[Seam]:
    """All notes of the product, by file and in order.

    Raises:
        SeamNoteError: a note that is not in the form.
    """
    return [
        seam
        for folder in PRODUCT
        for path in sorted((root / folder).rglob("*.py"))
        for seam in seams_of(path.read_text(), str(path.relative_to(root)))
    ]


def seams_of(source: str, file: str) -> Iterator[Seam]:
    """The notes of one module.

    Raises:
        SeamNoteError: a note that is not in the form.
    """
    for paragraph in _paragraphs(source):
        note = _NOTE.fullmatch(paragraph)
        if note is None:
            if MARK in paragraph or _STRAY.search(paragraph):
                raise SeamNoteError(
                    f"{file}: not a seam note in the form of scripts.seams: {paragraph}"
                )
            continue
        names, why, condition = note.groups()
        how = re.findall(r"\((\w+)\)", names)
        if not set(how) <= set(HOW) or MARK in condition:
            raise SeamNoteError(
                f"{file}: one of {', '.join(HOW)}, and one note an item: {paragraph}"
            )
        yield Seam(file, tuple(re.findall(r"`(.+?)`", names)), ", ".join(how), why, condition)


def _paragraphs(source: str) -> Iterator[str]:
    """List items and paragraphs of docstrings and comments, each on one line."""
    for text in (*_docstrings(source), *_comments(source)):
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            words = line.strip()
            if paragraph and (not words or words.startswith("* ")):
                yield " ".join(paragraph)
                paragraph = []
            if words:
                paragraph.append(words.removeprefix("* "))


def _docstrings(source: str) -> Iterator[str]:
    """Of modules, classes and functions, and of attributes, below which they stand."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value


def _comments(source: str) -> Iterator[str]:
    """Comments; lines that follow each other are one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [
        (token.start[0], token.string.lstrip("#: ").rstrip())
        for token in tokens
        if token.type == tokenize.COMMENT
    ]
    for _, block in groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        yield "\n".join(words for _, (_, words) in block)


def render(seams: list[Seam]) -> str:
    """The register as Markdown."""
    lines = [
        "# Seams",
        "",
        "What this project relies on inside vLLM and other packages, which may change at any time.",
        "Written by `python -m scripts.seams` from the notes in the code: edit those.",
        "",
        "| symbol | how | why | remove when |",
        "|---|---|---|---|",
    ]
    for file, own in groupby(seams, key=lambda seam: seam.file):
        lines.append(f"| **[{file}](../{file})** | | | |")
        for seam in own:
            symbols = ", ".join(f"`{symbol}`" for symbol in seam.symbols)
            cells = (symbols, seam.how, seam.why, seam.remove_when)
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REGISTER.write_text(render(read_seams()))
