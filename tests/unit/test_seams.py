# SPDX-License-Identifier: Apache-2.0
"""The register of seams: fresh, in one form, and of symbols that the installed vLLM has."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest

from scripts.seams import REGISTER, SeamNoteError, read_seams, render, seams_of

INSTALLED = Path(str(distribution("torch").locate_file("")))


def test_register_is_fresh() -> None:
    assert REGISTER.read_text() == render(read_seams()), "run python -m scripts.seams"


@pytest.mark.parametrize(
    "note",
    [
        "`vllm.a.B.c` (overridden): no end.",
        "`vllm.a.B.c` (patched): why. Remove when: x.",
        "B.c: why. Remove when: x.",
        "`vllm.a.B.c` (called): why. Can go when vLLM has it.",
        "vLLM seam: B.c.",
        "`vllm.a.b` (read): why. Remove when: x. `vllm.a.c` (read): why. Remove when: y.",
    ],
)
def test_a_note_in_another_form_is_found(note: str) -> None:
    with pytest.raises(SeamNoteError):
        list(seams_of(f'"""Module.\n\n* {note}\n"""\n', "file.py"))


def test_notes_are_found_in_docstrings_and_comments() -> None:
    source = '''def f():
    """Text.

    * `vllm.a.b`, `vllm.a.c` (called): a reason that goes
      on. Remove when: it is
      there.
    * `vllm.d` (read): why. Remove when: never.
    """
    # `vllm.e` (called), `vllm.f` (wrapped): why, over
    # two lines. Remove when: x.
    return 1
'''
    found = list(seams_of(source, "file.py"))
    assert [seam.symbols for seam in found] == [
        ("vllm.a.b", "vllm.a.c"),
        ("vllm.d",),
        ("vllm.e", "vllm.f"),
    ]
    assert [seam.how for seam in found] == ["called", "read", "called, wrapped"]
    assert found[0].why == "a reason that goes on."
    assert [seam.remove_when for seam in found] == ["it is there", "never", "x"]


@cache
def module(name: str) -> ast.Module | None:
    """The source of an installed module, which is not imported."""
    path = INSTALLED.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text()) if file.is_file() else None


def defined(node: ast.AST) -> Iterator[str]:
    """Names that the statements below a module or a class define, `self.name` included."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner.name
        elif isinstance(inner, ast.Name | ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr if isinstance(inner, ast.Attribute) else inner.id


def exists(dotted: str) -> bool:
    """Whether a module, or a member of a module or of one of its classes, is there."""
    parts = dotted.split(".")
    split = next(n for n in range(len(parts), -1, -1) if n == 0 or module(".".join(parts[:n])))
    where, name, members = ".".join(parts[:split]), parts[split : split + 1], parts[split + 1 :]
    tree = module(where) if where else None
    if tree is None or not name:
        return tree is not None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name[0]:
            bases = (f"{where}.{ast.unparse(base)}" for base in node.bases)
            return (
                not members
                or members[0] in defined(node)
                or any(exists(f"{base}.{members[0]}") for base in bases)
            )
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name[0] in (alias.name, alias.asname):
                    source = where if node.level else str(node.module)
                    if node.level and node.module:
                        source = f"{where}.{node.module}"
                    return exists(".".join([source, alias.name, *members]))
    return not members and name[0] in defined(tree)


def test_symbols_exist_in_the_installed_vllm() -> None:
    names = {name for seam in read_seams() for name in seam.symbols if name.startswith("vllm.")}
    assert not [name for name in sorted(names) if not exists(name)]


@pytest.mark.parametrize(
    "name",
    [
        "vllm.nothing",
        "vllm.v1.core.sched.scheduler.Scheduler.nothing",
        "vllm.v1.core.sched.scheduler.Nothing",
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler.nothing",
    ],
)
def test_symbols_that_are_gone_are_found(name: str) -> None:
    assert not exists(name)
