"""The local cache: copies of remote files, and files that are made here before they are uploaded."""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from doge.common.storage.local_files import PARTIAL, remove
from doge.common.storage.sentences import StorageError, in_sentences

_STAGING_SECONDS = 60  # a staging directory is locked long before it is this old


class RemoteCache:
    """A local directory with copies of remote files.

    Args:
        folder: The directory; by default `default_cache`.
    """

    def __init__(self, folder: str | None = None):
        self.folder = folder or default_cache()

    def path(self, address: str) -> str:
        """Path of the copy of a remote file: one hash a level, so that a directory's copies share a directory."""
        levels = [level for level in address.split("/") if level]
        return os.path.join(self.folder, *(hashlib.sha256(level.encode()).hexdigest()[:16] for level in levels))

    @contextmanager
    def staging(self) -> Iterator[str]:
        """A path in the cache to make a file at, locked while in use; removes what dead writers left.

        Raises StorageError if the cache cannot be used.
        """
        with in_sentences(self.folder):
            if self.folder == default_cache():
                private_cache()
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            for entry in os.scandir(self.folder):
                if entry.name.endswith(PARTIAL):
                    _remove_abandoned(entry.path)
            folder = tempfile.mkdtemp(suffix=PARTIAL, dir=self.folder)
            lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield f"{folder}/content"
        finally:
            os.close(lock)
            remove(folder)


def _remove_abandoned(folder: str) -> None:
    """Remove a staging directory unless its writer holds its lock, or is so new that it may be about to take it."""
    with suppress(OSError):
        if time.time() - os.stat(folder).st_mtime < _STAGING_SECONDS:
            return
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
        finally:
            os.close(lock)


def private_cache() -> str:
    """Create and return the default cache. Raises StorageError if it belongs to another user, who could plant files."""
    path = default_cache()
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.lstat(path).st_uid != os.getuid():
        raise StorageError(f"The cache directory {path} belongs to another user: set DOGE_CACHE to one of your own.")
    return path


def default_cache() -> str:
    """Directory of copies and compiled libraries on this machine: DOGE_CACHE, or a private temporary directory."""
    return os.environ.get("DOGE_CACHE") or os.path.join(tempfile.gettempdir(), f"doge-cache-{os.getuid()}")
