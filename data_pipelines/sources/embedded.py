"""The text that every machine already has: its Python installation.

Four virtual sources stand in for smollm-corpus: ``prose`` (the language reference's topics and the documentation in
docstrings), ``conversation`` (docstring to function), ``code`` (whole modules) and ``arithmetic`` (generated). Modules
are parsed, never imported. A virtual file is a range of modules, named ``python-installation://KIND/FROM-TO/MAX_BYTES``
by its place in a list that depends only on what is installed.
"""

import ast
import hashlib
import importlib.util
import os
import random
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from doge.common.errors import UserError

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

SCHEME = "python-installation://"
GROUP_COLUMN = "module"  # of every row: where its text is from
PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformers", "sklearn", "matplotlib", "ray", "pyarrow", "networkx")
KINDS = ("prose", "conversation", "code", "arithmetic")
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "ensurepip", "test", "tests", "_vendor", "testing"}
LARGEST_MODULE = 300_000  # bytes; a larger module is a table
LARGEST_CODE = 40_000  # of a module whose code is a document, so that there are many
FILES = {"prose": 8, "conversation": 4, "code": 2, "arithmetic": 1}  # many shards are soon there, large ones pad little
YIELD = {"prose": 0.25, "conversation": 0.35, "code": 1.0}  # bytes of text per byte of source, roughly
PROBLEMS = 20  # in a document of arithmetic, at most
DOCUMENT_BYTES = 600  # of a document of arithmetic, roughly


def list_files(path: str, max_bytes: int) -> list[tuple[str, int, str]]:
    """List the files of a virtual source as (path, size, identity).

    Raises:
        UserError: the kind is unknown, or ``max_bytes`` is not positive.
    """
    kind = path.removeprefix(SCHEME).strip("/")
    if kind not in KINDS:
        raise UserError(f"There is no source {path}: write one of {', '.join(SCHEME + kind for kind in KINDS)}.")
    if max_bytes < 1:
        raise UserError(f"max_bytes of {path} must be positive, not {max_bytes}.")
    count = max(1, max_bytes // DOCUMENT_BYTES) if kind == "arithmetic" else len(_modules(kind, max_bytes))
    bounds = [count * at // FILES[kind] for at in range(FILES[kind] + 1)]
    names = [f"{SCHEME}{kind}/{a}-{b}/{max_bytes}" for a, b in pairwise(bounds) if a < b]
    return [(name, 0, identity(name)) for name in names]


def identity(name: str) -> str:
    """Hex sha256 of everything that the rows of a virtual file depend on."""
    kind, start, stop, max_bytes = _parse(name)
    if kind == "arithmetic":
        return hashlib.sha256(f"arithmetic 2 {start} {stop}".encode()).hexdigest()
    digest = hashlib.sha256(f"{kind} 1".encode())
    for module, path in _modules(kind, max_bytes)[start:stop]:
        digest.update(f"{module}\x00".encode() + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def rows(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a virtual file: ``text``, the ``module`` it is from, and ``prompt`` for a conversation."""
    kind, start, stop, max_bytes = _parse(name)
    if kind == "arithmetic":
        yield from (
            {"text": _arithmetic(number), GROUP_COLUMN: f"arithmetic {number}"} for number in range(start, stop)
        )
        return
    make = {"prose": _prose, "conversation": _conversations, "code": _code}[kind]
    for module, path in _modules(kind, max_bytes)[start:stop]:
        try:
            source = Path(path).read_text("utf-8")
            yield from ({GROUP_COLUMN: module} | row for row in make(module, source))
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue  # a test file for broken syntax, or one written for another version


def _parse(name: str) -> tuple[str, int, int, int]:
    kind, bounds, max_bytes = name.removeprefix(SCHEME).split("/")
    start, stop = bounds.split("-")
    return kind, int(start), int(stop), int(max_bytes)


@lru_cache(maxsize=8)
def _modules(kind: str, max_bytes: int) -> list[tuple[str, str]]:
    """List the modules of a kind as (dotted name, path), shuffled by the hash of their names, up to the byte budget."""
    available = _all_modules()
    topics = [entry for entry in available if entry[0] == "pydoc_data.topics"]
    if kind == "prose":
        chosen = topics + [entry for at, entry in enumerate(available) if at % 4 and entry not in topics]
    elif kind == "conversation":
        chosen = [entry for at, entry in enumerate(available) if at % 4 == 0 and entry not in topics]
    else:
        standard = sysconfig.get_path("stdlib")
        chosen = [entry for entry in available if entry[1].startswith(standard) and entry not in topics]
        chosen = [entry for entry in chosen if Path(entry[1]).stat().st_size < LARGEST_CODE]
    budget, modules = max_bytes / YIELD[kind], []
    for module, path in chosen:
        if budget <= 0:
            break
        size = Path(path).stat().st_size
        budget -= size * (1 / YIELD[kind] if module == "pydoc_data.topics" else 1)
        modules.append((module, path))
    return sorted(modules, key=lambda entry: _hash("file", entry[0]))


@lru_cache(maxsize=1)
def _all_modules() -> list[tuple[str, str]]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            roots.append(Path(spec.origin).parent)
    found = {}
    for at, root in enumerate(roots):
        prefix = "" if at == 0 else f"{root.name}."
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder) / name
                    dotted = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
                    limit = float("inf") if dotted == "pydoc_data.topics" else LARGEST_MODULE
                    if 500 < path.stat().st_size < limit:
                        found[dotted.removesuffix(".__init__")] = str(path)
    return sorted(found.items(), key=lambda entry: _hash("module", entry[0]))


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\x00".join(parts).encode()).digest()


def _definitions(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Dotted name and node of every function and class, outer ones first, local ones left out."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")


def _prose(module: str, source: str) -> Iterator[dict[str, str]]:
    """Yield one document per topic of the language reference, or one with all docstrings of a module."""
    tree = ast.parse(source)
    if module == "pydoc_data.topics":
        table = tree.body[-1]
        assert isinstance(table, ast.Assign)
        for topic, entry in sorted(ast.literal_eval(table.value).items()):
            yield {"text": f"{topic}\n\n{entry}", GROUP_COLUMN: f"{module} {topic}"}
        return
    parts = [f"{module}\n\n{text}"] if (text := ast.get_docstring(tree)) else []
    for name, node in _definitions(tree, f"{module}."):
        text = ast.get_docstring(node)
        if text and len(text) > 60:
            parts.append(f"{name}\n\n{text}")
    if parts:
        yield {"text": "\n\n".join(parts)}


def _conversations(module: str, source: str) -> Iterator[dict[str, str]]:
    """Yield each documented function: its documentation as the prompt, its code without that as the answer."""
    lines = source.splitlines()
    for name, node in _definitions(ast.parse(source), ""):
        text = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef) or not text or len(node.body) < 2:
            continue
        documentation = node.body[0]
        code = lines[node.lineno - 1 : documentation.lineno - 1] + lines[documentation.end_lineno : node.end_lineno]
        indent = min((len(line) - len(line.lstrip()) for line in code if line.strip()), default=0)
        prompt = f"Write the Python function `{name}` of the module `{module}`.\n\n{text}"
        yield {"prompt": prompt, "text": "\n".join(line[indent:] for line in code)}


def _code(module: str, source: str) -> Iterator[dict[str, str]]:
    yield {"text": f"# {module.replace('.', '/')}.py\n{source}"}


def _arithmetic(number: int) -> str:
    """Make up to twenty worked problems, a pure function of ``number``."""
    source = random.Random(f"arithmetic {number}")
    return "\n\n".join(source.choice(_PROBLEMS)(source) for _ in range(source.randint(1, PROBLEMS)))


def _sum(source: random.Random) -> str:
    a, b = source.randrange(10_000), source.randrange(10_000)
    return f"What is {a} + {b}?\n{a} + {b} = {a + b}"


def _difference(source: random.Random) -> str:
    a, b = sorted((source.randrange(10_000), source.randrange(10_000)), reverse=True)
    return f"What is {a} - {b}?\n{a} - {b} = {a - b}, because {b} + {a - b} = {a}."


def _product(source: random.Random) -> str:
    a, b = source.randrange(2, 100), source.randrange(11, 100)
    tens, ones = b // 10 * 10, b % 10
    return f"What is {a} * {b}?\n{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"


def _quotient(source: random.Random) -> str:
    a, b = source.randrange(100, 10_000), source.randrange(2, 100)
    return f"Divide {a} by {b}.\n{a} = {b} * {a // b} + {a % b}, so the quotient is {a // b} and the remainder {a % b}."


def _equation(source: random.Random) -> str:
    a, x, b = source.randrange(2, 20), source.randrange(-50, 50), source.randrange(1, 100)
    return f"Solve {a}x + {b} = {a * x + b}.\n{a}x = {a * x + b} - {b} = {a * x}, so x = {a * x} / {a} = {x}."


_PROBLEMS = (_sum, _difference, _product, _quotient, _equation)
