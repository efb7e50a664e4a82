# SPDX-License-Identifier: Apache-2.0
"""Whether the product's overrides take what a release of vLLM hands to the methods they replace.

Read from source on both sides: a method marked `@override`, in a class that names a class of vLLM
as a base, also one that only type checkers see. A base that is chosen at run time has no name; its
method is the one that a seam note of the file calls overridden.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scripts.seams import seams_of
from scripts.vllm_sources import Sources

Function = ast.FunctionDef | ast.AsyncFunctionDef


def misfits(sources: Sources, root: Path, folders: tuple[str, ...]) -> list[str]:
    """A line for each override that vLLM has no method for, or another than ours can stand for."""
    lines = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if ".venv" in path.parts:
                continue
            file = path.relative_to(root)
            text = path.read_text()
            for method, named in _overrides(ast.parse(text)):
                bases = named or _noted(text, method.name)
                theirs = [
                    (f"{base}.{method.name}", symbol.node)
                    for base in bases
                    if (symbol := sources.resolve(f"{base}.{method.name}"))
                ]
                if bases and not theirs:
                    lines.append(f"OVERRIDE   {bases[0]}.{method.name} ({file})\n    is not there")
                for name, node in theirs:
                    if isinstance(node, Function) and (wrong := _misfit(method, node)):
                        lines.append(f"OVERRIDE   {name} ({file})\n    {wrong}")
    return lines


def _overrides(tree: ast.Module) -> Iterator[tuple[Function, list[str]]]:
    """Methods marked `@override`, and the bases in vLLM that their class names, if any."""
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [names[text] for base in node.bases if (text := ast.unparse(base)) in names]
            for member in node.body:
                if isinstance(member, Function) and "override" in map(
                    ast.unparse, member.decorator_list
                ):
                    yield member, bases


def _noted(text: str, method: str) -> list[str]:
    """The classes of vLLM whose `method` the notes of a module call overridden."""
    symbols = [
        symbol for seam in seams_of(text, "") if "overridden" in seam.how for symbol in seam.symbols
    ]
    return [
        owner
        for owner, _, name in (symbol.rpartition(".") for symbol in symbols)
        if name == method and owner.startswith("vllm.")
    ]


def _misfit(ours: Function, theirs: Function) -> str | None:
    """Why `ours` cannot be called as `theirs` can; None: it can."""
    own, other = ours.args, theirs.args
    own_names = [arg.arg for arg in (*own.posonlyargs, *own.args)]
    other_names = [arg.arg for arg in (*other.posonlyargs, *other.args)]
    anything = own.vararg is not None and own.kwarg is not None
    for place, name in enumerate(other_names):
        if own_names[place : place + 1] != [name] and not (anything and name not in own_names):
            return f"ours does not take {name!r} as argument {place}"
    own_keywords = {arg.arg for arg in own.kwonlyargs} | set(own_names)
    for arg in other.kwonlyargs:
        if arg.arg not in own_keywords and own.kwarg is None:
            return f"ours does not take the keyword {arg.arg!r}"
    if other.vararg is not None and own.vararg is None:
        return f"ours does not take *{other.vararg.arg}"
    if other.kwarg is not None and own.kwarg is None:
        return f"ours does not take **{other.kwarg.arg}"
    needed = own_names[: len(own_names) - len(own.defaults)]
    needed += [
        arg.arg
        for arg, default in zip(own.kwonlyargs, own.kw_defaults, strict=True)
        if default is None
    ]
    known = {*other_names, *(arg.arg for arg in other.kwonlyargs)}
    if other.vararg is None and other.kwarg is None:
        for name in needed:
            if name not in known:
                return f"ours needs {name!r}"
    return None
