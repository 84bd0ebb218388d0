"""Local files that appear whole or not at all, also after a power failure."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress

PARTIAL = ".partial"  # ends the name of a file that is being written, or was when its writer died


def commit(temporary: str, target: str, before_commit: Callable[[], object] = lambda: None) -> None:
    """Flush a local file or directory to the disk, then let it appear as ``target`` by a rename.

    ``before_commit`` is called just before the rename, and may raise.
    """
    _flush(temporary)
    before_commit()
    _replace(temporary, target)


def remove(path: str) -> None:
    """Remove a file or a directory, if it exists."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)


def sha256(path: str) -> str:
    """Hex digest of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(new: str, target: str) -> None:
    """Rename ``new`` to ``target``, durably. No rename replaces a directory, so an old one is moved aside first."""
    aside = f"{new.removesuffix(PARTIAL)}.old{PARTIAL}"
    if os.path.isdir(target):
        os.rename(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if os.path.exists(aside):
            os.rename(aside, target)
        raise
    _flush_one(os.path.dirname(target))
    remove(aside)


def _flush(path: str) -> None:
    """Force a file, or a directory with everything below it, to the disk."""
    for folder, _, names in os.walk(path):
        for name in [*names, ""]:
            _flush_one(os.path.join(folder, name))
    if not os.path.isdir(path):
        _flush_one(path)


def _flush_one(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
