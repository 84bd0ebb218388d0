"""The head's own disk for nodes that do not see it: an actor beside the driver, and a file system that asks it.

storage = share(Storage(root))  # once, on the driver; then send ``storage`` to any task or actor
"""

import os
import shutil
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from doge.common.storage import Storage, StorageError, check_marker, commit, marker_name

CHUNK_BYTES = 8 * 2**20  # of one message
REQUESTS = 4  # under way at a time, for one file
SERVER_THREADS = 16

Version = tuple[int, int, int]  # of a file's content: inode, time of its last change in ns, size in bytes


def share(storage: Storage) -> Storage:
    """Return the same storage in a form that other processes can open. Call it once, on the driver; keep the result.

    A remote root is returned as it is. For a local one a file server starts on this node and ends with this process or
    the last reference to it here. Where the result is opened in a process that sees the directory, it is a local
    Storage; elsewhere one that goes through the server.

    Raises StorageError if the root cannot be used.
    """
    if storage.is_shared:
        return storage
    try:
        name = marker_name()
        storage.write_bytes(name, b"")
        marker = storage.path(name)
    except StorageError:  # it may be read but not written: nobody can tell that it is the same directory
        if not os.path.isdir(storage.root):
            raise
        marker = None
    filesystem = HeadFileSystem(_start(storage.root, marker), socket.gethostname())
    if marker is not None:
        weakref.finalize(filesystem, _remove_file, marker)
    return storage.through(filesystem, marker)


def _start(root: str, marker: str | None) -> Any:
    """Start a file server on this node; returns the actor's handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"max_restarts": -1, "max_task_retries": 3}
    options = {"num_cpus": 0, "max_concurrency": SERVER_THREADS, "scheduling_strategy": here, **lasting}
    return ray.remote(FileServer).options(**options).remote(root, marker)


def _remove_file(path: str) -> None:
    with suppress(OSError):
        os.remove(path)


class FileServer:
    """The actor's class: reads and writes files below ``root`` for processes elsewhere. It keeps nothing in memory.

    A path outside the root is refused with PermissionError; links that lie below the root are followed.
    """

    def __init__(self, root: str, marker: str | None = None):
        self._root, self._marker = root, marker

    def info(self, path: str) -> dict[str, Any]:
        """Size and type of a file or directory, as fsspec describes them. Raises FileNotFoundError."""
        return _describe(self._path(path))

    def list(self, path: str) -> list[dict[str, Any]]:
        """Return the `info` of every entry of a directory."""
        found = []
        with os.scandir(self._path(path)) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed or renamed meanwhile
                    found.append(_describe(entry.path))
        return found

    def read(self, path: str, start: int, length: int) -> tuple[Version, bytes]:
        """Read up to ``length`` bytes from ``start``; returns the version of the file and the bytes."""
        with open(self._path(path), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            content = os.pread(file.fileno(), length, start)
        return (status.st_ino, status.st_mtime_ns, status.st_size), content

    def create(self, path: str) -> None:
        """Create an empty file and the directories above it."""
        path = self._path(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass

    def write(self, path: str, start: int, content: bytes) -> None:
        with open(self._path(path), "r+b", buffering=0) as file:
            view = memoryview(content)
            while view:
                written = os.pwrite(file.fileno(), view, start)
                view, start = view[written:], start + written

    def makedirs(self, path: str, exist_ok: bool) -> None:
        os.makedirs(self._path(path), exist_ok=exist_ok)

    def commit(self, temporary: str, target: str) -> None:
        commit(self._path(temporary), self._path(target))

    def remove(self, path: str, recursive: bool) -> None:
        path = self._path(path)
        if path == self._root:
            raise PermissionError(f"{path} is the root")
        if not os.path.isdir(path) or os.path.islink(path):
            os.remove(path)
        elif recursive:
            shutil.rmtree(path)
        else:
            os.rmdir(path)

    def _path(self, path: str) -> str:
        if self._marker is not None:
            check_marker(self._root, self._marker)
        normal = os.path.normpath(path)
        if ".." in path.split("/") or not (normal == self._root or normal.startswith(f"{self._root}/")):
            raise PermissionError(f"{path} lies outside {self._root}")
        return normal


def _describe(path: str) -> dict[str, Any]:
    status = os.stat(path)
    is_directory = os.path.isdir(path)
    return {
        "name": path,
        "size": 0 if is_directory else status.st_size,
        "type": "directory" if is_directory else "file",
        "mtime": status.st_mtime,
    }


class HeadFileSystem(AbstractFileSystem):
    """fsspec's view of a `FileServer`; paths are those on the server's node.

    Files travel in messages of 8 MiB, four under way at a time. Errors of the server are raised here as they were
    there; one that is gone is a StorageError.

    Args:
        server: the actor's handle.
        host: name of its machine, for messages and to tell cached files of different machines apart.
    """

    protocol = "head"
    root_marker = "/"
    cachable = False
    atomic_renames = True

    def __init__(self, server: Any, host: str):
        super().__init__()
        self.server, self.host = server, host

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("info", self._strip_protocol(path))
        return found

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        information = self.info(path)
        found = [information] if information["type"] == "file" else self._ask("list", path)
        return found if detail else sorted(entry["name"] for entry in found)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes ``[start, end)`` of one version of the file, however often it is replaced meanwhile."""
        size = self.info(path)["size"] if (start or 0) < 0 or (end or 0) < 0 else 0
        start = max(0, size + start) if start is not None and start < 0 else start or 0
        end = size + end if end is not None and end < 0 else end
        while True:
            try:
                return b"".join(self._read(self._strip_protocol(path), start, end))
            except _Replaced:
                continue

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        rpath = self._strip_protocol(rpath)
        while True:
            try:
                with open(lpath, "wb") as file:
                    file.writelines(self._read(rpath))
                return
            except _Replaced:
                continue

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        rpath = self._strip_protocol(rpath)
        if os.path.isdir(lpath):
            self.makedirs(rpath, exist_ok=True)
            return
        self._ask("create", rpath)
        with open(lpath, "rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            requests = (("write", rpath, at * CHUNK_BYTES, chunk) for at, chunk in enumerate(chunks))
            for _done in self._ask_many(requests):
                pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._ask("makedirs", self._strip_protocol(path), exist_ok)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        self.makedirs(path)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Flush to the disk, then rename, replacing what is there."""
        self._ask("commit", self._strip_protocol(path1), self._strip_protocol(path2))

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        for one in [path] if isinstance(path, str) else path:
            self._ask("remove", self._strip_protocol(one), recursive)

    def rm_file(self, path: str) -> None:
        self.rm(path)

    def rmdir(self, path: str) -> None:
        self.rm(path)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> "_File":
        return _File(self, path, mode, block_size or CHUNK_BYTES, **options)

    def _read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the chunks of a range in order. Raises _Replaced if the file changed between two of them."""
        version, first = self._ask("read", path, start, CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - start))
        yield first
        stop = version[2] if end is None else min(end, version[2])
        starts = range(start + len(first), stop, CHUNK_BYTES) if first else ()
        requests = (("read", path, at, min(CHUNK_BYTES, stop - at)) for at in starts)
        for now, chunk in self._ask_many(requests):
            if now != version:
                raise _Replaced
            yield chunk

    def _ask(self, method: str, *arguments: Any) -> Any:
        return next(self._ask_many([(method, *arguments)]))

    def _ask_many(self, requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the answers in order, with up to ``REQUESTS`` requests under way."""
        import ray

        waiting: deque[Any] = deque()

        def answer() -> Any:
            try:
                return ray.get(waiting.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.ActorUnavailableError as error:
                raise StorageError(
                    f"The storage on {self.host} does not answer for now: check the network between here and there, "
                    "then run the same command to resume from the last commit."
                ) from error
            except ray.exceptions.RayError as error:
                raise StorageError(
                    f"The storage on {self.host} cannot be reached any more, since the driver that served it is gone: "
                    "run the same command to resume from the last commit."
                ) from error

        for name, *arguments in requests:
            method = getattr(self.server, name)
            if name == "commit":  # all else may be done twice
                method = method.options(max_task_retries=0)
            waiting.append(method.remote(*arguments))
            if len(waiting) == REQUESTS:
                yield answer()
        while waiting:
            yield answer()


class _Replaced(Exception):
    """A file was replaced while it was read."""


class _File(AbstractBufferedFile):
    """A file of the server, read or written in ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        found: bytes = self.fs.cat_file(self.path, start, end)
        return found

    def _initiate_upload(self) -> None:
        self.fs._ask("create", self.path)

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs._ask("write", self.path, self.offset, self.buffer.getvalue())
        return True
