# SPDX-License-Identifier: Apache-2.0
"""The stubs by which mypy checks overrides say what the installed vLLM's source says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.seams import ROOT
from scripts.vllm_sources import Symbol, installed

STUBS = ROOT / "stubs"
INSTALLED = installed()
KINDS = ("property", "classmethod", "staticmethod", "overload")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def differences(source: str, module: str) -> Iterator[str]:
    """What a stub of `module` says and vLLM does not."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        symbol = INSTALLED.resolve(f"{module}.{node.name}")
        if symbol is None or not isinstance(symbol.node, ast.ClassDef):
            yield f"{node.name}: no such class"
            continue
        bases = {ast.unparse(base) for base in symbol.node.bases}
        for base in map(ast.unparse, node.bases):
            # All of vLLM's pydantic models are `OpenAIBaseModel`.
            if base not in bases and not (base == "BaseModel" and "OpenAIBaseModel" in bases):
                yield f"{node.name}: not a subclass of {base}"
        if dataclass_of(node) != dataclass_of(symbol.node):
            yield f"{node.name}: another kind of dataclass"
        for member in node.body:
            yield from of_member(module, symbol.node, member)


def of_member(module: str, owner: ast.ClassDef, member: ast.stmt) -> Iterator[str]:
    if isinstance(member, ast.AnnAssign):
        name = f"{owner.name}.{ast.unparse(member.target)}"
        if INSTALLED.resolve(f"{module}.{name}") is None:
            yield f"{name}: no such attribute"
    elif isinstance(member, Function):
        name = f"{owner.name}.{member.name}"
        theirs = overloads(owner, member.name) or resolved(f"{module}.{name}")
        if signature(member) not in {signature(function, member) for function in theirs}:
            yield f"{name}: another signature"


def overloads(owner: ast.ClassDef, name: str) -> list[Function]:
    functions = [n for n in owner.body if isinstance(n, Function) and n.name == name]
    return functions if len(functions) > 1 else []


def resolved(name: str) -> list[Function]:
    """A method that the class itself defines or inherits."""
    symbol: Symbol | None = INSTALLED.resolve(name)
    return [symbol.node] if symbol is not None and isinstance(symbol.node, Function) else []


def dataclass_of(node: ast.ClassDef) -> list[str]:
    texts = map(ast.unparse, node.decorator_list)
    return [text for text in texts if text.startswith("dataclass")]


def signature(node: Function, stub: Function | None = None) -> str:
    """Kind, parameters and result, in one form.

    Args:
        node: of vLLM, or of a stub.
        stub: may annotate what vLLM does not, and leave a default out as `...`.
    """
    arguments = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(arguments, Function)
    args, returns = arguments.args, arguments.returns
    if stub is not None:
        for own, theirs in zip(all_arguments(stub.args), all_arguments(args), strict=False):
            theirs.annotation = theirs.annotation or own.annotation
        returns = returns or stub.returns
        for own_values, values in (
            (stub.args.defaults, args.defaults),
            (stub.args.kw_defaults, args.kw_defaults),
        ):
            for i, own_value in enumerate(own_values[: len(values)]):
                if own_value is not None and ast.unparse(own_value) == "...":
                    values[i] = own_value
    kinds = [text for text in map(ast.unparse, node.decorator_list) if text in KINDS]
    waits = isinstance(node, ast.AsyncFunctionDef) and not is_generator(node)
    result = "" if returns is None else ast.unparse(returns)
    # Annotations in quotation marks are those without.
    text = f"{kinds} {'async ' * waits}({ast.unparse(args)}) -> {result}"
    return text.replace("'", "").replace('"', "")


def all_arguments(args: ast.arguments) -> list[ast.arg]:
    more = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *more]


def is_generator(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node))


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.relative_to(STUBS))) for p in sorted(STUBS.rglob("*.pyi"))]
)
def test_stub_is_true(path: Path) -> None:
    module = ".".join(path.relative_to(STUBS).with_suffix("").parts)
    assert not list(differences(path.read_text(), module.removesuffix(".__init__")))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("def add_request(self, request: Request) -> None: ...", []),
        ("def add_request(self, request: Request, more: int) -> None: ...", ["another signature"]),
        ("def add_request(self, request: str) -> None: ...", ["another signature"]),
        ("def add_request(self, request: Request) -> int: ...", ["another signature"]),
        ("async def add_request(self, request: Request) -> None: ...", ["another signature"]),
        ("def add_nothing(self) -> None: ...", ["another signature"]),
        ("running: list[Request]", []),
        ("walking: list[Request]", ["no such attribute"]),
    ],
)
def test_a_lie_is_found(body: str, found: list[str]) -> None:
    source = f"class Scheduler:\n    {body}\n"
    lies = differences(source, "vllm.v1.core.sched.scheduler")
    assert [lie.partition(": ")[2] for lie in lies] == found
