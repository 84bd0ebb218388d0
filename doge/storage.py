"""Everything durable goes through one root: a directory or any URI that fsspec opens.

A local root is served in place. A remote one is read through a local cache, so that shards can be memory-mapped, and
written by uploading a finished local file. Either way a file appears whole or not at all.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from doge.errors import UserError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_PARTIAL = ".partial"  # what is being written, or was when its writer died


class Storage:
    """Files below one root, named by relative POSIX paths.

    Args:
        root: a local path (``~`` is expanded) or a URI such as ``s3://bucket/prefix``.
        cache: local directory for copies of remote files; a directory under the system's temporary one by default.

    Every method raises UserError where the root may not be used, and where the disk is full.
    """

    def __init__(self, root: str, cache: str | None = None):
        if "://" not in root:
            root = os.path.abspath(os.path.expanduser(root))
        self.root = root.rstrip("/")
        self._filesystem, self._base = _open_root(self.root)
        protocols = self._filesystem.protocol
        self.is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._cache = cache or os.path.join(tempfile.gettempdir(), "doge-cache")

    def __truediv__(self, prefix: str) -> "Storage":
        return Storage(f"{self.root}/{prefix}", self._cache)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def path(self, name: str) -> str:
        """The full path or URI of ``name``."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return self._filesystem.exists(f"{self._base}/{name}")

    def size(self, name: str) -> int:
        """Bytes of ``name``; raises FileNotFoundError."""
        return self._filesystem.info(f"{self._base}/{name}")["size"]

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files and directories directly under ``prefix`` (nothing if it does not exist)."""
        try:
            with self._in_sentences():
                found = self._filesystem.ls(f"{self._base}/{prefix}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name and not name.endswith(_PARTIAL))

    def read_bytes(self, name: str) -> bytes:
        """The whole of ``name``, never from the cache; raises FileNotFoundError."""
        with self._in_sentences(), self._filesystem.open(f"{self._base}/{name}", "rb") as file:
            return file.read()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write ``name`` whole or not at all."""
        self.write(name, lambda path: Path(path).write_bytes(content))

    def write(self, name: str, fill: Callable[[str], object]) -> None:
        """Let ``fill(local_path)`` make a file or a directory, then let it appear as ``name`` at once.

        The commit is one rename on a local root, or two where a directory replaces another, and an upload on a remote
        one; a remote directory is complete only once a file that its reader checks last (a manifest) is there.
        """
        target = f"{self._base}/{name}"
        if self.is_local:
            parent = os.path.dirname(target)
            temporary = os.path.join(parent, f".{os.path.basename(target)}.{uuid.uuid4().hex}{_PARTIAL}")
        else:
            parent = self._cache
            temporary = os.path.join(parent, f"{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with self._in_sentences():
                os.makedirs(parent, exist_ok=True)
                fill(temporary)
                if self.is_local:
                    _flush(temporary)
                    _replace(temporary, target)
                else:
                    is_directory = os.path.isdir(temporary)
                    if is_directory:
                        self.delete(name)  # it would be put into the one that is there
                    self._filesystem.put(temporary, target, recursive=is_directory)
                    self.forget(name)
        finally:
            _remove(temporary)

    def local(self, name: str) -> str:
        """A local path with the content of ``name``, fetched into the cache once if the root is remote.

        Only for files that never change under their name. Raises FileNotFoundError.
        """
        if self.is_local:
            path = f"{self._base}/{name}"
            if not os.path.exists(path):
                raise FileNotFoundError(path)
            return path
        path = self._cached(name)
        if not os.path.exists(path):
            temporary = f"{path}.{uuid.uuid4().hex}{_PARTIAL}"
            try:
                with self._in_sentences():
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    self._filesystem.get(f"{self._base}/{name}", temporary)
                    os.replace(temporary, path)
            finally:
                _remove(temporary)
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
        if self.is_local and os.path.isdir(self._base):
            for name in os.listdir(self._base):
                if name.endswith(_PARTIAL):
                    _remove(os.path.join(self._base, name))

    def _cached(self, name: str) -> str:
        """Where the copy of ``name`` lies: a hash for each level, so that a directory's copies share a directory."""
        levels = [level for level in self.path(name).split("/") if level]
        return os.path.join(self._cache, *(hashlib.sha256(level.encode()).hexdigest()[:16] for level in levels))

    @contextmanager
    def _in_sentences(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            number = _error_number(error)
            if number in _FULL_DISK:
                raise UserError(
                    f"The disk that holds {self.root if self.is_local else self._cache} is full: free some space and "
                    "run the same command again; everything committed so far is kept."
                ) from error
            if number in _UNUSABLE or isinstance(error, PermissionError):  # s3fs gives its own no number
                raise UserError(
                    f"The storage {self.root} cannot be used ({error}): choose one that you may read and write."
                ) from error
            raise


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
    _flush_directory(os.path.dirname(target))
    _remove(aside)


def _flush(path: str) -> None:
    """Force a file, or every file below a directory, to the disk before the rename makes it visible."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for file in files or [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_directory(path: str) -> None:
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
