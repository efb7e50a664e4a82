# SPDX-License-Identifier: Apache-2.0
"""Rules of the house: who may import what, and sizes. Source is read, not imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from scripts.seams import ROOT

PACKAGE = ROOT / "himap_vllm"
CODE = ("himap_vllm", "server", "evaluation", "demo", "training", "bench", "tests", "scripts")

# Room (a folder or a module at the top of the package) -> rooms it may import; and of `vllm` and
# `torch`, those that it may import while it is imported itself.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "himap_vllm": (set(), set()),
    "bootstrap": (set(), set()),
    "config": ({"plan"}, set()),
    "processor": (set(), set()),
    "vllm_versions": (set(), set()),
    "plugin": ({"processor", "vllm_versions", "config", "frontend"}, set()),
    "plan": ({"config"}, {"vllm"}),
    "frontend": ({"vllm_versions", "config", "plan", "model"}, {"vllm"}),
    "core": ({"config", "plan"}, {"vllm"}),
    "kernels": ({"plan"}, {"vllm", "torch"}),
    "criteria": ({"config", "plan", "kernels"}, {"torch"}),
    "pruning": ({"config", "plan", "core", "kernels", "criteria"}, {"vllm", "torch"}),
    "model": (
        {"config", "plan", "core", "kernels", "criteria", "pruning"},
        {"vllm", "torch"},
    ),
    "runner": ({"plan", "kernels", "pruning", "model"}, {"vllm", "torch"}),
}
# Modules that keep stricter rules than their room.
WITHOUT_VLLM = (
    "plan.cuts",
    "plan.grouping",
    "plan.prompt",
    "plan.step_layout",
    "plan.table",
    "plan.savings",
    "plan.voters",
    "plan.waiting",
    "model.families",
)
FROM_THE_API_PROCESS = "model.families"  # all that `frontend` may import of `model`

MAX_LEVELS = 8
MAX_ARROWS = 30
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Module:
    """One module of the package.

    Attributes:
        name: dotted, below `himap_vllm`; "" for the package itself.
        path: its file.
    """

    name: str
    path: Path

    @property
    def room(self) -> str:
        return self.name.split(".")[0] or "himap_vllm"

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    def imports(self, *, at_run_time: bool = True, lazy: bool = True) -> set[str]:
        """Dotted names that it imports, "package.name" for `from package import name`.

        Args:
            at_run_time: without those that are for type checkers only.
            lazy: with those inside functions.
        """
        names: set[str] = set()
        for node in _imports(self.tree.body, at_run_time, lazy):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names |= {alias.name for alias in node.names}
        return names


def _imports(
    body: list[ast.stmt], at_run_time: bool, lazy: bool
) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not (typing_only and at_run_time and field == "body"):
                yield from _imports(getattr(node, field, []), at_run_time, lazy)


def _modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules[name] = Module(name, path)
    return modules


MODULES = _modules()


def within(imported: set[str]) -> set[str]:
    """Those of the imported names that are modules of the package."""
    own = set()
    for name in imported:
        package, _, rest = name.partition(".")
        if package == "himap_vllm":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            own.add(rest)
    return own - {""}


def with_packages(names: set[str]) -> set[str]:
    """Modules and the packages around them, which Python imports first."""
    return names | {name.rpartition(".")[0] for name in names} - {""}


def graph(*, at_run_time: bool = True) -> dict[str, set[str]]:
    return {
        name: within(module.imports(at_run_time=at_run_time)) - {name}
        for name, module in MODULES.items()
    }


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """Level of each module: 1 for one that imports none of the package.

    Raises:
        ValueError: a circle.
    """
    done: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError(" -> ".join((*path[path.index(name) :], name)))
        if name not in done:
            done[name] = 1 + max((visit(to, (*path, name)) for to in edges[name]), default=0)
        return done[name]

    for name in edges:
        visit(name, ())
    return done


def test_no_circle_and_few_levels() -> None:
    """Whoever reads a module must have read that many before, at most."""
    levels(graph(at_run_time=False))
    height = levels(graph())
    assert max(height.values()) <= MAX_LEVELS, {n for n, h in height.items() if h > MAX_LEVELS}


def test_a_circle_is_found() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        levels({"a": {"b"}, "b": {"a"}})


def test_rooms_import_what_they_may() -> None:
    arrows = set()
    for name, others in graph(at_run_time=False).items():
        room = MODULES[name].room
        allowed, _ = ROOMS[room]
        for other in others:
            to = MODULES[other].room
            if to != room:
                arrows.add((room, to))
                assert to in allowed, f"{name} imports {other}"
            if room == "frontend" and to == "model":
                assert other == FROM_THE_API_PROCESS, f"{name} imports {other}"
    assert len(arrows) <= MAX_ARROWS


def test_processes_load_what_they_may() -> None:
    """What a module imports while it is imported, through others of the package, too."""
    for name, module in MODULES.items():
        _, allowed = ROOMS[module.room]
        if name in WITHOUT_VLLM:
            allowed = set()
        loaded, waiting = set(), {name}
        while waiting:
            loaded |= waiting
            own = set().union(*(MODULES[n].imports(lazy=False) for n in waiting))
            waiting = with_packages(within(own)) - loaded
            for package in {imported.split(".")[0] for imported in own} & {"vllm", "torch"}:
                assert package in allowed, f"{name} loads {package}"


def source_files() -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in source_files()
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_are_short() -> None:
    """All but kernels, which can't call functions at no cost."""
    long = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES and not kernel:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long
