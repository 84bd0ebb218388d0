"""The root of a storage.

A local root is served in place. A remote one is read through a local cache, so that shards can be memory-mapped, and
written by uploading a finished local file. Either way a file appears whole or not at all.

A Storage can be sent to other processes, except one that is a plain directory: its path may mean another disk there.
`cluster.machines.head_storage.share` gives the same storage in a form that is opened in place by processes that see the
directory, and through the driver by those that do not.
"""

import copy
import errno
import glob
import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from doge.common.errors import MachineError, UserError
from doge.common.paths import is_uri, plain_path
from doge.common.storage.local_files import PARTIAL, commit, remove
from doge.common.storage.remote_cache import RemoteCache
from doge.common.storage.sentences import StorageError, in_sentences

# Protocols whose drivers let the store refuse to create what exists (If-None-Match: s3fs, adlfs; a generation: gcsfs).
_REFUSING = {"s3", "s3a", "gs", "gcs", "az", "abfs", "memory"}
_MARKER = ".shared"  # ends the name of the file by which a process recognises the driver's directory


class Storage:
    """Files below one root, named by relative POSIX paths.

    Args:
        root: A local path (``~`` is expanded), its ``file:`` URI, which is the same, or a URI such as
            ``s3://bucket/prefix``.
        cache: Local directory for copies of remote files. By default each process uses the `default_cache` of its
            machine, so that processes of one machine share their copies.
        filesystem: File system to reach the root through, instead of the one that the root names. If its
            ``atomic_renames`` is true, its ``mv`` flushes the file and then replaces the target at once.
        marker: Local path of a file in the root's own directory. A process that sees this file opens the directory in
            place; only other processes go through ``filesystem``.
        cache_bytes: Most bytes that the copies may take on each machine; see `RemoteCache` for the default.

    Every method raises StorageError if the root cannot be reached, may not be used, or is on a full disk.
    """

    def __init__(
        self,
        root: str,
        cache: str | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
        marker: str | None = None,
        cache_bytes: int | None = None,
    ):
        self.root = (root if is_uri(root) else os.path.abspath(plain_path(root))).rstrip("/")
        self._opened = self.root  # what `root` begins with below it too
        self._arguments = cache, filesystem, marker, cache_bytes
        if filesystem is None or (marker is not None and os.path.exists(marker)):
            self._filesystem, self._base = _open_root(self.root)
        else:
            self._filesystem, self._base = filesystem, self.root
        protocols = self._filesystem.protocol
        self.is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._marker = marker if self.is_local else None
        self._cache = RemoteCache(cache, cache_bytes)

    def __truediv__(self, prefix: str) -> "Storage":
        below = copy.copy(self)
        below.root, below._base = f"{self.root}/{prefix}".rstrip("/"), f"{self._base}/{prefix}".rstrip("/")
        return below

    def __copy__(self) -> "Storage":
        same = object.__new__(Storage)
        same.__dict__.update(self.__dict__)
        return same

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.is_shared:
            raise pickle.PicklingError(
                f"{self!r} is a directory that another process may not see: send what "
                "cluster.machines.head_storage.share makes of it, or its path to a process of this machine."
            )
        return _reopen, (self._opened, self._arguments, self.root.removeprefix(self._opened).lstrip("/"))

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    @property
    def is_shared(self) -> bool:
        """Whether the same files are reached from every machine of the cluster."""
        return not self.is_local or self._arguments[1] is not None

    def through(self, filesystem: fsspec.AbstractFileSystem, marker: str | None) -> "Storage":
        """The same storage, reached through ``filesystem`` by processes that do not see the file ``marker``."""
        cache, _, _, cache_bytes = self._arguments
        return Storage(self.root, cache, filesystem, marker, cache_bytes)

    def path(self, name: str) -> str:
        """The full path or URI of ``name``."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file or directory ``name``."""
        with self._in_sentences():
            return bool(self._filesystem.exists(f"{self._base}/{name}"))

    def size(self, name: str) -> int:
        """The size of a file in bytes. Raises FileNotFoundError."""
        with self._in_sentences():
            return int(self._filesystem.info(f"{self._base}/{name}")["size"])

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files and directories directly under ``prefix`` (nothing if it does not exist)."""
        found = (path.rsplit("/", 1)[-1] for path in self._list(prefix))
        return sorted(name for name in found if name and not name.endswith((PARTIAL, _MARKER)))

    def read_bytes(self, name: str) -> bytes:
        """The whole content of ``name``, never from the cache. Raises FileNotFoundError."""
        with self._in_sentences():
            content: bytes = self._filesystem.cat_file(f"{self._base}/{name}")
            return content

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write ``name`` whole or not at all."""
        self.write(name, lambda path: Path(path).write_bytes(content))

    @property
    def has_renames(self) -> bool:
        """Whether a directory appears at once. An object store has none: there it appears file by file."""
        return self.is_local or bool(getattr(self._filesystem, "atomic_renames", False))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file whole, on a root without renames. Raises FileExistsError if it is there.

        Returns whether the root itself refuses the second of two writers. Where it cannot, they may both look at the
        same moment, and the later one replaces the file of the other.
        """
        path, protocols = f"{self._base}/{name}", self._filesystem.protocol
        can_refuse = not _REFUSING.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        exists = False
        with self._in_sentences():
            try:
                if can_refuse:
                    self._filesystem.pipe_file(path, content, mode="create")
            except FileExistsError:
                exists = True
            except OSError as error:  # s3fs: of a server that does not know If-None-Match, or refuses in its own words
                if error.errno == errno.EINVAL and self._filesystem.exists(path):
                    exists = True
                elif error.errno == errno.ENOSYS:
                    can_refuse = False
                else:
                    raise
            if not can_refuse:
                exists = bool(self._filesystem.exists(path))
                if not exists:
                    self._filesystem.pipe_file(path, content)
        if exists:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path(name))
        return can_refuse

    def write(
        self, name: str, fill: Callable[[str], object], before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """Let ``fill(local_path)`` make a file or a directory, then let it appear as ``name`` at once.

        The commit is one rename if the root's file system has renames (two if a directory replaces another), else an
        upload. An uploaded directory is complete only once a file that its reader checks (a manifest) says so.
        ``before_commit`` is called just before the rename or the upload; what it raises leaves everything as it was.
        """
        target = f"{self._base}/{name}"
        parent, last = target.rsplit("/", 1)
        temporary = f"{parent}/.{last}.{uuid.uuid4().hex}{PARTIAL}"
        if not self.is_local:
            self._upload(name, fill, before_commit, target, temporary)
            return
        try:
            with self._in_sentences():
                _make_directory(self.root, parent)
                fill(temporary)
                commit(temporary, target, before_commit)
        finally:
            with suppress(OSError):  # what it was made of may be gone, or never have been
                remove(temporary)

    def local(self, name: str, again: bool = False) -> str:
        """`reading`, but the copy of a remote file may be evicted at any time after."""
        with self.reading(name, again) as path:
            return path

    @contextmanager
    def reading(self, name: str, again: bool = False) -> Iterator[str]:
        """A local path with the content of ``name`` to open inside; a remote file is fetched into the cache once.

        Only for files that never change under their name; ``again`` replaces a copy that turned out to be damaged.
        Raises FileNotFoundError, and UserError if the file is larger than the cache may be.
        """
        if self.is_local:
            path = f"{self._base}/{name}"
            with self._in_sentences():
                os.stat(path)
            yield path
            return

        def fetch(target: str) -> None:
            self._cache.make_room(self.path(name), self.size(name))
            with self._in_sentences(self._cache.folder):
                self._filesystem.get_file(f"{self._base}/{name}", target)

        with self._cache.copy(self._address(name), fetch, again) as path:
            yield path

    def forget(self, name: str) -> None:
        """Drop the cached copies of a remote file, or of everything below a directory; `local` then fetches again."""
        if not self.is_local:
            remove(self._cache.path(self._address(name)))

    def delete(self, name: str) -> None:
        """Remove a file or a directory, if it exists."""
        with suppress(FileNotFoundError), self._in_sentences():
            self._filesystem.rm(self._literally(f"{self._base}/{name}"), recursive=True)
        self.forget(name)

    def sweep(self) -> None:
        """Remove unfinished files of killed writers directly under the root. Only safe while nobody writes there."""
        for path in self._list(""):
            if path.endswith(PARTIAL):
                with suppress(FileNotFoundError), self._in_sentences():
                    self._filesystem.rm(self._literally(path), recursive=True)

    def _list(self, prefix: str) -> list[str]:
        try:
            with self._in_sentences():
                found = self._filesystem.ls(f"{self._base}/{prefix}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/") for path in found]

    def _upload(
        self,
        name: str,
        fill: Callable[[str], object],
        before_commit: Callable[[], object],
        target: str,
        temporary: str,
    ) -> None:
        with self._cache.staging() as path:
            with in_sentences(self._cache.folder):
                fill(path)
            is_directory = os.path.isdir(path)
            put = self._filesystem.put if is_directory else self._filesystem.put_file
            options = {"recursive": True} if is_directory else {}
            if self.has_renames:
                try:
                    with self._in_sentences():
                        put(path, temporary, **options)
                    before_commit()
                    with self._in_sentences():
                        self._filesystem.mv(temporary, target)
                except BaseException:
                    with suppress(Exception):
                        self._filesystem.rm(temporary, recursive=True)
                    raise
            else:
                before_commit()
                if is_directory:
                    self.delete(name)  # put would place it inside the old directory
                with self._in_sentences():
                    put(path, target, **options)
        self.forget(name)

    def _literally(self, path: str) -> str:
        """The path for a removal, where the file systems of object stores take ``*``, ``?`` and ``[`` for a pattern."""
        return path if self.has_renames else glob.escape(path)

    def _address(self, name: str) -> str:
        """What the cache knows ``name`` by; the host tells apart disks that the path alone does not."""
        return f"{getattr(self._filesystem, 'host', '')}/{self.path(name)}"

    @contextmanager
    def _in_sentences(self, place: str | None = None) -> Iterator[None]:
        """Turn errors of the root, and of the directory ``place`` that is used with it, into StorageErrors."""
        if self._marker is not None:
            check_marker(self.root, self._marker)
        with in_sentences(place or self.root, self.root, remote=not self.is_local):
            yield


def _make_directory(root: str, path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except FileNotFoundError as error:  # file systems such as /proc say that what they do not let be made is not there
        raise StorageError(
            f"The storage {root} cannot be used ({error}): choose one that you may read and write."
        ) from error


def _reopen(root: str, arguments: tuple[Any, ...], below: str) -> Storage:
    """A Storage in another process; a name below the root, which may hold any character, is no part of a URI."""
    storage = Storage(root, *arguments)
    return storage / below if below else storage


def check_marker(root: str, marker: str) -> None:
    """Raise StorageError unless the root still has its marker."""
    if not os.path.exists(marker):
        raise StorageError(
            f"The storage {root} has vanished (its disk was unmounted or its directory removed): bring it back and "
            "run the same command again."
        )


def marker_name() -> str:
    """A new name for a marker file; `Storage.names` leaves markers out."""
    return f".{uuid.uuid4().hex}{_MARKER}"


def _open_root(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a root and the root's path in it."""
    if not is_uri(root):  # fsspec would take a part of some paths for something else
        return fsspec.filesystem("file"), root
    if root.lower().startswith(("http://", "https://")):
        raise UserError(
            f"The storage {root} is a web address, where nothing can be written: give a directory, or a URI such as "
            "s3://bucket/doge."
        )
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
        return filesystem, path
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or "the missing package"
        raise MachineError(
            f"The storage {root} cannot be opened ({error}): pip install {package} on every machine of the cluster."
        ) from error
    except Exception as error:  # each file system raises errors of its own
        raise UserError(
            f"The storage {root} cannot be opened ({error}): give a directory, or a URI such as s3://bucket/doge."
        ) from error
