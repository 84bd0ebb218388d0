"""Places: the files that a path, a directory, a glob or a URI names, and what is there besides.

What exists is taken as it is written, whatever characters its name holds; only the rest of a path is a pattern. What is
hidden counts from there on, never above.
"""

import glob
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class Found(NamedTuple):
    """The files at a place.

    Attributes:
        filesystem: the filesystem that they are in.
        files: what it knows of each, by path, sorted.
        left_out: paths of what is no file to read, by the reason.
    """

    filesystem: "AbstractFileSystem"
    files: dict[str, dict[str, Any]]
    left_out: dict[str, list[str]]


def open_place(place: str) -> tuple["AbstractFileSystem", str]:
    """Open the filesystem of a path or URI and return it with the path in it."""
    import fsspec

    local = fsspec.filesystem("file")
    if os.path.lexists(place):  # even with a "::" in it, which links the URIs of a chain
        return local, os.path.abspath(place)
    if place.startswith(("/", "~", "./", "../", "file://")):
        return local, local._strip_protocol(place)
    return fsspec.core.url_to_fs(place)


def find(place: str) -> Found:
    """Find all files at a place, below a directory at any depth. Passes on the errors of its filesystem."""
    filesystem, path = open_place(place)
    base, pattern = _split(path, filesystem.exists)
    look = _local if _is_local(filesystem) else _remote
    return look(filesystem, base, pattern)


def uri(place: str, filesystem: "AbstractFileSystem", path: str) -> str:
    """The URI that opens a file found at a place; in a chain, such as ``zip://*::s3://…``, one link is replaced."""
    from fsspec.implementations.chained import ChainedFileSystem

    if _is_local(filesystem):
        return f"file://{path}"
    links, at = place.split("::"), 0
    if issubclass(type(filesystem), ChainedFileSystem):  # a cache, whose path may stand in a later link
        at = next((number for number, link in enumerate(links) if link.partition("://")[2]), len(links) - 1)
    links[at] = filesystem.unstrip_protocol(path)
    return "::".join(links)


def _is_local(filesystem: "AbstractFileSystem") -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _split(path: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """Split a path into what exists as it is written and the pattern after it, "" if there is none."""
    parts = path.split("/")
    if glob.has_magic(path) and not exists(path):
        for at, part in enumerate(parts):
            if glob.has_magic(part) and not exists("/".join(parts[: at + 1])):
                return "/".join(parts[:at]), "/".join(parts[at:])
    return path, ""


def _asks_for_hidden(pattern: str) -> bool:
    return "/." in f"/{pattern}"


def _remote(filesystem: "AbstractFileSystem", base: str, pattern: str) -> Found:
    if pattern:
        found = filesystem.glob("/".join([glob.escape(base), pattern]) if base else pattern, detail=True)
    else:
        found = filesystem.find(base, detail=True)
        if not found:
            filesystem.info(base)  # which says what is wrong where `find` is silent: a web server that does not answer
    files = {path: info for path, info in sorted(found.items()) if info["type"] == "file"}
    hidden = []
    if not _asks_for_hidden(pattern):
        hidden = [path for path in files if "/." in "/" + path.removeprefix(base).lstrip("/")]
    for path in hidden:
        del files[path]
    return Found(filesystem, files, {} if pattern else {"hidden": hidden})


def _local(filesystem: "AbstractFileSystem", base: str, pattern: str) -> Found:
    from fsspec.utils import glob_translate

    if os.path.isfile(base):
        return Found(filesystem, {base: filesystem.info(base)}, {})
    depth = pattern.count("/") if pattern and "**" not in pattern else None
    files, hidden, lost, special = _walk(base.rstrip("/") + "/", depth, _asks_for_hidden(pattern))
    if pattern:
        matches = re.compile(glob_translate(pattern)).match
        files, lost, special = (
            {path for path in paths if matches(os.path.relpath(path, base))} for paths in (files, lost, special)
        )
        hidden = set()
    left_out = {
        "hidden": sorted(hidden),
        "linked to nowhere": sorted(lost),
        "neither file nor directory": sorted(special),
    }
    return Found(filesystem, {path: filesystem.info(path) for path in sorted(files)}, left_out)


def _walk(top: str, depth: int | None, enter_hidden: bool) -> tuple[set[str], set[str], set[str], set[str]]:
    """The files, hidden entries, lost links, and pipes, sockets and devices below a directory.

    Links are followed, but each directory is entered once: by the way to it that follows no link, if there is one.
    """
    files, hidden, lost, special = set[str](), set[str](), set[str](), set[str]()
    entered, folders, links = set[str](), [(top, 0)], list[tuple[str, int]]()
    while folders or links:
        folder, level = folders.pop() if folders else links.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") and not enter_hidden:
                    hidden.add(entry.path)
                elif entry.is_file():
                    files.add(entry.path)
                elif not entry.is_dir():
                    (special if os.path.exists(entry.path) else lost).add(entry.path)
                elif depth is None or level < depth:
                    (links if entry.is_symlink() else folders).append((entry.path, level + 1))
    return files, hidden, lost, special
