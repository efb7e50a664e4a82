# SPDX-License-Identifier: Apache-2.0
"""vLLM's Python sources of any release, read as syntax trees and never imported.

A release is taken from the source distribution on the package index that pip is configured for.
Only its Python files are kept, in a cache folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

_INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
_JSON = "application/vnd.pypi.simple.v1+json"
_SECONDS = 120
# The parts of vLLM that run an engine. Models, benchmarks and layers call much by the same names.
CALLERS = ("v1", "entrypoints", "engine", "config", "plugins")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.stmt


def cache_folder() -> Path:
    """Where releases are kept: `HIMAP_VLLM_SOURCES`, else the user's cache."""
    chosen = os.environ.get("HIMAP_VLLM_SOURCES")
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "himap-vllm" / "vllm-sources"


def fetch(version: str) -> Path:
    """The folder that holds `vllm/` of a release; downloaded once.

    Raises:
        LookupError: the index has no source distribution of that version.
        ValueError: the download does not have the digest that the index promises.
    """
    folder = cache_folder() / version
    if folder.is_dir():
        return folder
    url, digest = _find(version)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "vllm.tar.gz"
        with urllib.request.urlopen(url, timeout=_SECONDS) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file)
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{url} does not have the digest {digest}")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, inside = member.name.partition("/")
                if member.isfile() and inside.startswith("vllm/") and inside.endswith(".py"):
                    member.name = inside
                    tar.extract(member, unpacked, filter="data")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


def _find(version: str) -> tuple[str, str]:
    """Address and SHA-256 of the source distribution."""
    request = urllib.request.Request(f"{_INDEX}/vllm/", headers={"Accept": _JSON})
    with urllib.request.urlopen(request, timeout=_SECONDS) as response:
        files = json.load(response)["files"]
    for file in files:
        if file["filename"] == f"vllm-{version}.tar.gz":
            return urllib.parse.urljoin(request.full_url, file["url"]), file["hashes"]["sha256"]
    raise LookupError(f"{_INDEX} has no source distribution of vllm {version}")


@dataclass(frozen=True)
class Symbol:
    """A definition in vLLM.

    Attributes:
        module: dotted name of the module that defines it.
        name: its dotted name in that module.
        node: its syntax tree.
    """

    module: str
    name: str
    node: Definition

    @property
    def signature(self) -> str:
        """Parameters of a function, bases of a class, else empty."""
        if isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = "".join(f"@{ast.unparse(d)} " for d in self.node.decorator_list)
            return f"{decorators}({ast.unparse(self.node.args)})"
        if isinstance(self.node, ast.ClassDef):
            return f"({', '.join(map(ast.unparse, self.node.bases))})"
        return ""

    @property
    def digest(self) -> str:
        """Of the definition without docstrings, comments and layout; a class: of its interface.

        A class counts with the names, annotations and signatures of its members: bodies of methods
        that the project relies on have symbols of their own.
        """
        node = ast.parse(ast.unparse(self.node)).body[0]
        if isinstance(node, ast.ClassDef):
            node.body = [_interface(member) for member in node.body]
        for inner in ast.walk(node):
            body = getattr(inner, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                inner.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]


def _interface(member: ast.stmt) -> ast.stmt:
    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
        member.body = [ast.Pass()]
    return member


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class Sources:
    """The modules below one `vllm/`."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `vllm/`: a fetched release, or a site-packages folder."""
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def resolve(self, dotted: str) -> Symbol | None:
        """Where a dotted name is defined, re-exports and base classes followed; None: nowhere."""
        parts = dotted.split(".")
        for split in range(len(parts), 0, -1):
            module = ".".join(parts[:split])
            tree = self._tree(module)
            if tree is not None:
                return self._member(module, tree, parts[split:])
        return None

    def callers(self, names: Collection[str]) -> dict[str, set[str]]:
        """By name, the functions of vLLM's `CALLERS`, as `module:qualified name`, that call it."""
        callers: dict[str, set[str]] = {name: set() for name in names}
        if not callers:
            return callers
        mentioned = re.compile(rf"\b({'|'.join(map(re.escape, callers))})\(")
        files = (self._folder / "vllm" / part for part in CALLERS)
        for file in sorted(file for folder in files for file in folder.rglob("*.py")):
            text = file.read_text()
            if not mentioned.search(text):
                continue
            parts = file.relative_to(self._folder).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            tree = self._tree(module)
            for place, name in _calls(tree) if tree is not None else ():
                if name in callers:
                    callers[name].add(f"{module}:{place}")
        return callers

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self._folder.joinpath(*module.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._trees[module] = ast.parse(file.read_text()) if file.is_file() else None
        return self._trees[module]

    def _member(self, module: str, tree: ast.Module, names: list[str]) -> Symbol | None:
        if not names:
            return Symbol(module, "", ast.Pass())
        # vllm.envs makes its variables from a table when they are asked for.
        if module == "vllm.envs" and f'"{names[0]}":' in self._text(module):
            return Symbol(module, names[0], ast.Pass())
        node: Definition | None = None
        for statement in _statements(tree.body):
            if names[0] in _defined(statement):
                node = statement
            for target in _imported(statement, names[0], module, self._is_package(module)):
                found = self.resolve(".".join([target, *names[1:]]))
                if found is not None:
                    return found
        return self._inside(module, node, names) if node is not None else None

    def _inside(self, module: str, node: Definition, names: list[str]) -> Symbol | None:
        """The symbol `names` whose first part is `node`."""
        if len(names) == 1:
            return Symbol(module, names[0], node)
        if not isinstance(node, ast.ClassDef):
            return None
        own: Definition | None = None
        for member in _statements(node.body):
            if names[1] in _defined(member):
                own = member
            elif names[1] in _assigned_to_self(member):
                own = own or ast.Pass()  # that it is set counts, not all that `__init__` does
        if own is not None:
            found = self._inside(module, own, names[1:])
            return found and Symbol(found.module, f"{names[0]}.{found.name}", found.node)
        for base in node.bases:
            found = self.resolve(f"{module}.{ast.unparse(base)}.{'.'.join(names[1:])}")
            if found is not None:
                return found
        return None

    def _text(self, module: str) -> str:
        return self._folder.joinpath(*module.split(".")).with_suffix(".py").read_text()

    def _is_package(self, module: str) -> bool:
        return self._folder.joinpath(*module.split(".")).is_dir()


@cache
def installed() -> Sources:
    """vLLM beside torch in this environment, under whichever name it was installed."""
    return Sources(Path(str(distribution("torch").locate_file(""))))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at one level, those under `if` and `try` included."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {
            name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
        }
    return set()


def _assigned_to_self(node: ast.stmt) -> set[str]:
    """Attributes that a method sets."""
    if not isinstance(node, ast.FunctionDef):
        return set()
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


def _imported(node: ast.stmt, name: str, module: str, is_package: bool) -> Iterator[str]:
    """What `name` may stand for, if `node` imports it from vLLM."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.asname == name)
    if not isinstance(node, ast.ImportFrom):
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parent = parts[: len(parts) - node.level + int(is_package)]
        base = ".".join([*parent, *([base] if base else [])])
    if base.split(".")[0] != "vllm":
        return
    for alias in node.names:
        if alias.name == "*" or (alias.asname or alias.name) == name:
            yield f"{base}.{name if alias.name == '*' else alias.name}"


def _calls(tree: ast.AST, place: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of (function that calls, name called)."""
    for node in ast.iter_child_nodes(tree):
        inner = place
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{place}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield inner, node.func.attr
            elif isinstance(node.func, ast.Name):
                yield inner, node.func.id
        yield from _calls(node, inner)
