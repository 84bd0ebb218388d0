"""Names and sizes: a reader who knows a module's or a class's name knows which one is meant."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

from source_tree import PACKAGES, ROOT, SCRIPTS, modules, room, tree

MAX_LINES = 400
# Names that may stand twice, each with its reason.
EXPECTED = {
    "__main__": "Python's own name for a package's command",
}
# Packages that our dependencies look for by name, whether or not they are installed here.
PROBED = {"evaluate", "kernels", "peft", "serving", "trl", "vllm"}

SOURCES = [
    path for top in (*PACKAGES, SCRIPTS) for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".cpp", ".h")
]


def twins(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Which names stand in more than one room: from (name, module that has it)."""
    places = defaultdict(list)
    for name, module in named:
        places[name].append(module)
    return {
        name: found
        for name, found in places.items()
        if len({room(module) for module in found}) > 1 and name not in EXPECTED
    }


def listed(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {', '.join(modules)}" for name, modules in found.items())


def packaged_modules() -> list[str]:
    return [name for name in modules() if name.split(".")[0] in PACKAGES]


def test_no_two_modules_of_one_name():
    files = [name for name in packaged_modules() if modules()[name].name != "__init__.py"]
    found = twins((name.rsplit(".", 1)[-1], name) for name in files)
    assert not found, listed(found)


def test_no_two_classes_of_one_name():
    found = twins(
        (node.name, module)
        for module in packaged_modules()
        for node in tree(module).body
        if isinstance(node, ast.ClassDef)
    )
    assert not found, listed(found)


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    found = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not found, f"each of these holds two things: {found}"


def test_no_command_hides_a_module_that_something_imports():
    """A file run as a script puts its own folder first on the import path."""
    elsewhere = [folder for folder in sys.path if Path(folder or ".").resolve() not in {ROOT, *Path(__file__).parents}]
    commands = [path for top in ("jobs", SCRIPTS) for path in (ROOT / top).rglob("*.py") if path.stem != "__init__"]
    hidden = [
        str(path.relative_to(ROOT))
        for path in commands
        if path.stem in sys.stdlib_module_names
        or path.stem in {*PACKAGES, *PROBED}
        or PathFinder.find_spec(path.stem, elsewhere)
    ]
    assert not hidden, hidden
