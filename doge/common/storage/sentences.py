"""Errors of file systems as sentences that say what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from doge.common.errors import MachineError, UserError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_UNREACHABLE = {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.EHOSTUNREACH} | {
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH
}  # fmt: skip


class StorageError(MachineError):
    """The storage cannot be used now: full, unreachable, vanished, or forbidden; trying again may help."""


class CacheError(StorageError):
    """This machine's cache directory cannot be used: another machine has its own."""


@contextmanager
def in_sentences(place: str, root: str | None = None, remote: bool = False) -> Iterator[None]:
    """Turn file-system errors into StorageErrors; other errors, and FileNotFoundError, pass unchanged.

    Args:
        place: Directory or URI that may be full or forbidden: the root, or the cache directory.
        root: Root of the storage that is used inside; None if only the cache is.
        remote: Whether the root is remote. Remote file systems raise errors of their own kinds, so each of them is
            taken to mean that the root cannot be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in _FULL_DISK:
            kind = StorageError if place == root else CacheError
            raise kind(
                f"The disk that holds {place} is full: free some space and run the same command again; "
                "everything committed so far is kept."
            ) from error
        if number in _UNUSABLE or isinstance(error, PermissionError):  # s3fs raises one without a number
            named = str(getattr(error, "filename", None) or "")
            if root is not None and (place == root or not named.startswith(place)):
                raise StorageError(
                    f"The storage {root} cannot be used ({error}): choose one that you may read and write."
                ) from error
            raise CacheError(
                f"The cache directory {place} cannot be used ({error}): choose one that you may read and write."
            ) from error
        foreign = remote and not isinstance(error, FileNotFoundError)
        if root is not None and (foreign or number in _UNREACHABLE):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise StorageError(
                f"The storage {root} cannot be reached ({reason}): check that it is up and run the same command "
                "again; everything committed so far is kept."
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or the one in the text of an error from a Rust library (safetensors, tokenizers)."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
