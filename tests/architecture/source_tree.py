"""The project's modules and what each imports, read from the source without importing anything."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
PACKAGES = ("doge", "data_pipelines", "cluster", "tune", "jobs")
SCRIPTS = "benchmarks"  # not a package: nothing imports it from outside

When = Literal["at import", "in a function", "for types"]


@dataclass(frozen=True)
class Import:
    """`importer` imports `target`, a module of the project or the dotted name of another package's."""

    importer: str
    target: str
    line: int
    when: When

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the project, by its dotted name; a package is named by its folder."""
    found = {}
    for top in (*PACKAGES, SCRIPTS):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def imports(module: str) -> tuple[Import, ...]:
    """All imports of a module, at any depth."""
    return tuple(_imports(module, tree(module), "at import"))


def all_imports() -> Iterator[Import]:
    for module in modules():
        yield from imports(module)


def room(module: str) -> tuple[str, ...]:
    """The package and the folder or file directly below it: ("doge", "model")."""
    return tuple(module.split(".")[:2])


def _imports(module: str, node: ast.AST, when: When) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, child.lineno, when)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{module}:{child.lineno} has a relative import: write the whole name"
            assert child.module
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(module, whole if whole in modules() else child.module, child.lineno, when)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for part in child.body:
                yield from _imports(module, ast.Module([part], []), "for types")
            for part in child.orelse:
                yield from _imports(module, ast.Module([part], []), when)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _imports(module, child, "in a function" if when == "at import" else when)
        else:
            yield from _imports(module, child, when)
