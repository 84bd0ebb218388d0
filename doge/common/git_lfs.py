"""Git LFS pointers: what a clone holds in place of its large files until `git lfs pull` fetches them."""

from pathlib import Path

from doge.common.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
"""What a pointer begins with."""


class GitLfsPointer(ValueError):
    """A file is a pointer."""


def refuse_pointer(file: Path) -> None:
    """Raise UserError if a file is a pointer; OSError if it cannot be read."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise UserError(f"{file} is a Git LFS pointer in place of the file: run `git lfs pull` in its folder.")
