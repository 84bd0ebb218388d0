"""Everything durable goes through one root: a directory or any URI that fsspec opens.

A local root is served in place. A remote one is read through a local cache, so that shards can be memory-mapped, and
written by uploading a finished local file. Either way a file appears whole or not at all.

A Storage can be sent to other processes. One whose root is a directory of the driver is
opened in place by those that see the directory, and through the driver by those that do not.
"""

import copy
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from doge.common.errors import UserError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_UNREACHABLE = {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.EHOSTUNREACH} | {
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH
}  # fmt: skip
_PARTIAL = ".partial"  # what is being written, or was when its writer died
_MARKER = ".shared"  # what a process that sees the driver's directory finds there
_STAGING_SECONDS = 60  # a staging directory is locked long before it is this old


class StorageError(UserError):
    """The storage cannot be used now: full, unreachable, vanished, or forbidden; trying again may help."""


class Storage:
    """Files below one root, named by relative POSIX paths.

    Args:
        root: a local path (``~`` is expanded) or a URI such as ``s3://bucket/prefix``.
        cache: local directory for copies of remote files; in every process that opens the storage by default its own
            DOGE_CACHE, or a private directory of its user under the system's temporary one.
        filesystem: reach the root through it, not through what the root names. One whose ``atomic_renames`` is true
            has a ``mv`` that flushes and then replaces at once.
        marker: local path of a file by which a process knows the root's own directory: one that sees it opens that,
            and only others go through ``filesystem``.

    Every method raises StorageError where the root may not be used or is not to be reached, and where the disk is full.
    """

    def __init__(
        self,
        root: str,
        cache: str | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
        marker: str | None = None,
    ):
        if "://" not in root:
            root = os.path.abspath(os.path.expanduser(root))
        self.root = root.rstrip("/")
        self._arguments = cache, filesystem, marker
        if filesystem is None or (marker is not None and os.path.exists(marker)):
            self._filesystem, self._base = _open_root(self.root)
        else:
            self._filesystem, self._base = filesystem, self.root
        protocols = self._filesystem.protocol
        self.is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._marker = marker if self.is_local else None
        self._cache = cache or default_cache()

    def __truediv__(self, prefix: str) -> "Storage":
        below = copy.copy(self)
        below.root, below._base = f"{self.root}/{prefix}".rstrip("/"), f"{self._base}/{prefix}".rstrip("/")
        return below

    def __copy__(self) -> "Storage":
        same = object.__new__(Storage)
        same.__dict__.update(self.__dict__)
        return same

    def __reduce__(self):
        return Storage, (self.root, *self._arguments)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    @property
    def is_shared(self) -> bool:
        """Whether every process of the cluster that is given it reaches the same files."""
        return not self.is_local or self._arguments[1] is not None

    def path(self, name: str) -> str:
        """The full path or URI of ``name``."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        with self._in_sentences():
            return self._filesystem.exists(f"{self._base}/{name}")

    def size(self, name: str) -> int:
        """Bytes of ``name``; raises FileNotFoundError."""
        with self._in_sentences():
            return self._filesystem.info(f"{self._base}/{name}")["size"]

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files and directories directly under ``prefix`` (nothing if it does not exist)."""
        found = (path.rsplit("/", 1)[-1] for path in self._list(prefix))
        return sorted(name for name in found if name and not name.endswith((_PARTIAL, _MARKER)))

    def read_bytes(self, name: str) -> bytes:
        """The whole of ``name``, never from the cache; raises FileNotFoundError."""
        with self._in_sentences():
            return self._filesystem.cat_file(f"{self._base}/{name}")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write ``name`` whole or not at all."""
        self.write(name, lambda path: Path(path).write_bytes(content))

    def write(self, name: str, fill: Callable[[str], object]) -> None:
        """Let ``fill(local_path)`` make a file or a directory, then let it appear as ``name`` at once.

        The commit is one rename where the root's file system can (two where a directory replaces another), elsewhere
        an upload; a directory that is uploaded is complete only once a file that its reader checks (a manifest) says
        so.
        """
        target = f"{self._base}/{name}"
        parent, last = target.rsplit("/", 1)
        temporary = f"{parent}/.{last}.{uuid.uuid4().hex}{_PARTIAL}"
        if not self.is_local:
            self._upload(name, fill, target, temporary)
            return
        try:
            with self._in_sentences():
                os.makedirs(parent, exist_ok=True)
                fill(temporary)
                commit(temporary, target)
        finally:
            _remove(temporary)

    def local(self, name: str, again: bool = False) -> str:
        """A local path with the content of ``name``, fetched into the cache once if the root is remote.

        Only for files that never change under their name; ``again`` fetches one whose copy turned out to be damaged.
        Raises FileNotFoundError.
        """
        if self.is_local:
            path = f"{self._base}/{name}"
            with self._in_sentences():
                os.stat(path)
            return path
        path = self._cached(name)
        if again or not os.path.exists(path):
            with self._staging() as temporary, self._in_sentences(self._cache):
                self._filesystem.get_file(f"{self._base}/{name}", temporary)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(temporary, path)
        return path

    def forget(self, name: str) -> None:
        """Drop the cached copies of a remote file or of all below a directory: the next ``local`` fetches again."""
        if not self.is_local:
            _remove(self._cached(name))

    def delete(self, name: str) -> None:
        """Remove a file or a directory; nothing happens if it is not there."""
        with suppress(FileNotFoundError), self._in_sentences():
            self._filesystem.rm(f"{self._base}/{name}", recursive=True)
        self.forget(name)

    def sweep(self) -> None:
        """Remove what killed writers left directly under the root. Only where nobody else is writing."""
        for path in self._list(""):
            if path.endswith(_PARTIAL):
                with suppress(FileNotFoundError), self._in_sentences():
                    self._filesystem.rm(path, recursive=True)

    def _list(self, prefix: str) -> list[str]:
        try:
            with self._in_sentences():
                found = self._filesystem.ls(f"{self._base}/{prefix}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/") for path in found]

    def _upload(self, name: str, fill: Callable[[str], object], target: str, temporary: str) -> None:
        renames = getattr(self._filesystem, "atomic_renames", False)
        with self._staging() as path:
            with self._in_sentences(self._cache, reaching=False):
                fill(path)
            is_directory = os.path.isdir(path)
            put = self._filesystem.put if is_directory else self._filesystem.put_file
            options = {"recursive": True} if is_directory else {}
            with self._in_sentences():
                if renames:
                    try:
                        put(path, temporary, **options)
                        self._filesystem.mv(temporary, target)
                    except BaseException:
                        with suppress(Exception):
                            self._filesystem.rm(temporary, recursive=True)
                        raise
                else:
                    if is_directory:
                        self.delete(name)  # it would be put into the one that is there
                    put(path, target, **options)
        self.forget(name)

    @contextmanager
    def _staging(self) -> Iterator[str]:
        """A path in the cache to make a file at. It stays locked while in use: what dead writers left goes first."""
        with self._in_sentences(self._cache, reaching=False):
            self._make_cache()
            for entry in os.scandir(self._cache):
                if entry.name.endswith(_PARTIAL):
                    _remove_abandoned(entry.path)
            folder = tempfile.mkdtemp(suffix=_PARTIAL, dir=self._cache)
            lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield f"{folder}/content"
        finally:
            os.close(lock)
            _remove(folder)

    def _make_cache(self) -> None:
        if self._cache == default_cache():
            private_cache()
        os.makedirs(self._cache, mode=0o700, exist_ok=True)

    def _cached(self, name: str) -> str:
        """Where the copy of ``name`` lies: a hash for each level, so that a directory's copies share a directory."""
        host = getattr(self._filesystem, "host", "")  # whose disk it is, where the path alone does not say
        levels = [level for level in f"{host}/{self.path(name)}".split("/") if level]
        return os.path.join(self._cache, *(hashlib.sha256(level.encode()).hexdigest()[:16] for level in levels))

    @contextmanager
    def _in_sentences(self, place: str | None = None, reaching: bool = True) -> Iterator[None]:
        """Turn what goes wrong into StorageErrors.

        Args:
            place: the directory that can be full or forbidden, if not the root.
            reaching: whether the root is used at all, so that an error may mean that it cannot be reached.
        """
        place = self.root if place is None or self.is_local else place
        try:
            if self._marker is not None:
                check_marker(self.root, self._marker)
            yield
        except UserError:
            raise
        except Exception as error:
            number = _error_number(error)
            if number in _FULL_DISK:
                raise StorageError(
                    f"The disk that holds {place} is full: free some space and "
                    "run the same command again; everything committed so far is kept."
                ) from error
            if number in _UNUSABLE or isinstance(error, PermissionError):  # s3fs gives its own no number
                what = "storage" if place == self.root else "cache directory"
                raise StorageError(
                    f"The {what} {place} cannot be used ({error}): choose one that you may read and write."
                ) from error
            foreign = reaching and not self.is_local and not isinstance(error, FileNotFoundError)
            if foreign or (reaching and number in _UNREACHABLE):  # every remote file system has errors of its own
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise StorageError(
                    f"The storage {self.root} cannot be reached ({reason}): "
                    "check that it is up and run the same command again; everything committed so far is kept."
                ) from error
            raise


def check_marker(root: str, marker: str) -> None:
    """Raise StorageError unless the directory is still the one in which the marker was left."""
    if not os.path.exists(marker):
        raise StorageError(
            f"The storage {root} has vanished (its disk was unmounted or its directory removed): bring it back and "
            "run the same command again."
        )


def marker_name() -> str:
    """A new name for a marker, which `Storage.names` leaves out."""
    return f".{uuid.uuid4().hex}{_MARKER}"


def commit(temporary: str, target: str) -> None:
    """Flush a local file or directory to the disk, then let it appear as ``target`` by a rename."""
    _flush(temporary)
    _replace(temporary, target)


def sha256(path: str) -> str:
    """Hex digest of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_root(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a root and the root's path in it."""
    try:
        return fsspec.core.url_to_fs(root)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or "what it needs"
        raise UserError(
            f"The storage {root} cannot be opened ({error}): pip install {package} on every machine of the cluster."
        ) from error
    except Exception as error:  # each file system has its own
        raise UserError(
            f"The storage {root} cannot be opened ({error}): give a directory, or a URI such as s3://bucket/doge."
        ) from error


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or of one that a Rust library (safetensors, tokenizers) only tells in its text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _replace(new: str, target: str) -> None:
    """Rename ``new`` to ``target``, durably. No rename replaces a directory, so that one steps aside first."""
    aside = f"{new.removesuffix(_PARTIAL)}.old{_PARTIAL}"
    if os.path.isdir(target):
        os.rename(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if os.path.exists(aside):
            os.rename(aside, target)
        raise
    _flush_one(os.path.dirname(target))
    _remove(aside)


def _flush(path: str) -> None:
    """Force a file, or a directory with all below it, to the disk before the rename makes it visible."""
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


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def _remove_abandoned(folder: str) -> None:
    """Remove a staging directory unless the process that made it still holds its lock, or is about to take it."""
    with suppress(OSError):
        if time.time() - os.stat(folder).st_mtime < _STAGING_SECONDS:
            return
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        finally:
            os.close(lock)


def private_cache() -> str:
    """`default_cache`, made. Raises StorageError where another user has made it, who could put anything there."""
    path = default_cache()
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.lstat(path).st_uid != os.getuid():
        raise StorageError(f"The cache directory {path} belongs to another user: set DOGE_CACHE to one of your own.")
    return path


def default_cache() -> str:
    """Where copies and what is compiled lie on this machine: DOGE_CACHE, or a directory of this user's."""
    return os.environ.get("DOGE_CACHE") or os.path.join(tempfile.gettempdir(), f"doge-cache-{os.getuid()}")
