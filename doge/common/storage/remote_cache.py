"""The local cache: copies of remote files, and files that are made here before they are uploaded.

All processes of a user on a machine share it. Its locks are the kernel's (`flock`), which a process that dies gives up.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from doge.common.errors import UserError
from doge.common.storage.local_files import PARTIAL, remove
from doge.common.storage.sentences import CacheError, in_sentences

_COPIES = "copies"


class RemoteCache:
    """A local directory with copies of remote files.

    Args:
        folder: The directory; by default `default_cache`.
        limit: Most bytes that the copies may take; what was used longest ago is evicted. By default they take no more
            than they leave free on their disk, since nobody knows beforehand what else it will hold.
    """

    def __init__(self, folder: str | None = None, limit: int | None = None):
        self.folder = folder or default_cache()
        self.limit = limit

    def path(self, address: str) -> str:
        """Path of the copy of a remote file: one hash a level, so that a directory's copies share a directory."""
        levels = [level for level in address.split("/") if level]
        hashes = (hashlib.sha256(level.encode()).hexdigest()[:16] for level in levels)
        return os.path.join(self.folder, _COPIES, *hashes)

    @contextmanager
    def copy(self, address: str, fetch: Callable[[str], None], again: bool = False) -> Iterator[str]:
        """The path of a copy, which nobody evicts inside.

        Where there is none, one process calls ``fetch(path)`` while the others that want it wait. ``again`` replaces a
        copy that turned out to be damaged. Raises CacheError if the cache cannot be used.
        """
        path = self.path(address)
        lock = None if again else self._use(path)
        if lock is None:
            with self.staging(hashlib.sha256(address.encode()).hexdigest()[:32]) as temporary:
                lock = None if again else self._use(path)  # another process may have fetched it meanwhile
                if lock is None:
                    fetch(temporary)
                    lock = self._keep(temporary, path)
        try:
            yield path
        finally:
            _unlock(lock)

    def make_room(self, name: str, size: int) -> None:
        """Evict copies until a file of ``size`` bytes fits, before it is fetched.

        Raises UserError, which calls the file ``name``, if it can never fit.
        """
        if self.limit is not None and size > self.limit:
            raise UserError(
                f"The file {name} needs {size / 2**30:,.2f} GiB of the cache on each machine, which may take "
                f"{self.limit / 2**30:,.2f} GiB: raise --cache-gib to at least {size / 2**30 + 0.005:,.2f}."
            )
        with in_sentences(self.folder), self._accounting():
            self._evict(size)

    @contextmanager
    def staging(self, name: str = "") -> Iterator[str]:
        """A path in the cache to make a file at, locked while in use; removes what dead writers left.

        Raises CacheError if the cache cannot be used.

        Args:
            name: of the work, which one process at a time does; by default it is nobody else's.
        """
        folder, lock = os.path.join(self.folder, f"{name or uuid.uuid4().hex}{PARTIAL}"), None
        with in_sentences(self.folder):
            if self.folder == default_cache():
                private_cache()
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            for entry in os.scandir(self.folder):
                if entry.name.endswith(PARTIAL) and entry.path != folder:
                    _remove_abandoned(entry.path)
            while lock is None:
                with suppress(FileExistsError):  # also where another removes it before makedirs has looked at it
                    os.makedirs(folder, mode=0o700)
                lock = _lock(folder, fcntl.LOCK_EX)
        try:
            yield f"{folder}/content"
        finally:
            remove(folder)
            _unlock(lock)

    def _use(self, path: str) -> int | None:
        """Lock a copy against its eviction and note its use; None if there is none."""
        with in_sentences(self.folder):
            lock = _lock(path, fcntl.LOCK_SH)
            if lock is not None:
                _stamp(path)
            return lock

    def _keep(self, temporary: str, path: str) -> int:
        """Let a fetched file be a copy, in use; evict others for what was fetched meanwhile. Returns its lock."""
        with in_sentences(self.folder), self._accounting():
            _stamp(temporary)
            lock = _lock(temporary, fcntl.LOCK_SH)
            assert lock is not None, "a file in a locked staging directory is its owner's alone"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(temporary, path)
            self._evict(0)
            return lock

    @contextmanager
    def _accounting(self) -> Iterator[None]:
        """Be the only one who counts the copies."""
        folder = os.path.join(self.folder, _COPIES)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(lock)

    def _evict(self, size: int) -> None:
        """Remove the copies that were used longest ago until ``size`` more bytes fit; those being opened stay."""
        now, copies = time.monotonic_ns(), []
        for folder, _, names in os.walk(os.path.join(self.folder, _COPIES)):
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.stat(os.path.join(folder, name))
                    used = status.st_mtime_ns
                    copies.append((used <= now, used, status.st_size, os.path.join(folder, name)))
        total = sum(each for _, _, each, _ in copies)
        limit = (total + shutil.disk_usage(self.folder).free) // 2 if self.limit is None else self.limit
        for _, _, each, path in sorted(copies):  # a time that has not come yet was stamped before the machine's start
            if total + size <= limit:
                return
            lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                remove(path)  # whoever has mapped it keeps it
                _unlock(lock)
                total -= each


def _stamp(path: str) -> None:
    """Note that a copy is used now, by the clock that all processes of a machine share and nobody can set."""
    now = time.monotonic_ns()
    os.utime(path, ns=(now, now))


def _lock(path: str, operation: int) -> int | None:
    """Lock a file or directory until the returned descriptor is closed; None if it is gone, or others hold its lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, operation)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # nobody removed it meanwhile
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _unlock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor too
    os.close(lock)


def _remove_abandoned(folder: str) -> None:
    """Remove a staging directory unless its writer lives, who holds its lock; one who is about to makes it again."""
    with suppress(OSError):
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            remove(folder)
            _unlock(lock)


def private_cache() -> str:
    """Create and return the default cache. Raises CacheError if it belongs to another user, who could plant files."""
    path = default_cache()
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.lstat(path).st_uid != os.getuid():
        raise CacheError(f"The cache directory {path} belongs to another user: set DOGE_CACHE to one of your own.")
    return path


def default_cache() -> str:
    """Directory of copies and compiled libraries on this machine: DOGE_CACHE, or a private temporary directory."""
    return os.environ.get("DOGE_CACHE") or os.path.join(tempfile.gettempdir(), f"doge-cache-{os.getuid()}")
