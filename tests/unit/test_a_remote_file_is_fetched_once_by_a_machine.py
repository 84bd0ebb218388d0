import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.implementations.local import LocalFileSystem

from cluster.machines.head_storage import HeadFileSystem
from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict
from doge.common.errors import UserError
from doge.common.storage import Storage

SIZE = 1000  # bytes of every file
FORK = multiprocessing.get_context("fork")


class Remote(LocalFileSystem):
    """A directory that is not seen in place; it counts what is fetched, slowly, and may kill who fetches."""

    protocol, cachable = "remote", False
    seconds, deadly = 0.0, False

    def get_file(self, rpath, lpath, **options):
        with open(f"{os.path.dirname(rpath)}.log", "a") as log:
            log.write(f"{os.path.basename(rpath)}\n")
        if self.deadly:
            Path(lpath).write_bytes(b"half")
            time.sleep(self.seconds)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        super().get_file(rpath, lpath, **options)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    for name in "abcd":
        (tmp_path / "root" / name).write_bytes(name.encode() * SIZE)
    return tmp_path / "root"


def opened(root, files: float | None = None) -> Storage:
    limit = None if files is None else int(files * SIZE)
    return Storage(str(root), cache=str(root.parent / "cache"), filesystem=Remote(), cache_bytes=limit)


def fetched(root) -> str:
    log = Path(f"{root}.log")
    return log.read_text().replace("\n", "") if log.exists() else ""


def copies(root) -> list[str]:
    """The first letter of every file that there is a copy of."""
    files = (path for path in (root.parent / "cache/copies").rglob("*") if path.is_file())
    return sorted(path.read_text()[0] for path in files)


def read(storage: Storage, name: str) -> None:
    with storage.reading(name) as path:
        assert Path(path).read_bytes() == name.encode() * SIZE


def test_only_what_is_read_is_fetched_and_only_once(root):
    for _ in range(2):
        storage = opened(root)
        assert storage.names() == list("abcd")
        read(storage, "b")
    assert (fetched(root), copies(root)) == ("b", ["b"])


def test_processes_that_ask_at_the_same_moment_fetch_it_once(root):
    storage = opened(root)
    storage._filesystem.seconds = 0.3
    processes = [FORK.Process(target=read, args=(storage, "a")) for _ in range(4)]
    threads = [threading.Thread(target=read, args=(storage, "a")) for _ in range(2)]
    for each in [*processes, *threads]:
        each.start()
    for each in [*processes, *threads]:
        each.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert fetched(root) == "a"
    assert os.listdir(root.parent / "cache") == ["copies"]


def test_a_writer_that_goes_while_another_comes_is_no_error(root, monkeypatch):
    make, gone = os.makedirs, []

    def makedirs(path, mode=0o777, exist_ok=False):
        if path.endswith(".partial") and not gone:  # it was there, and its writer has just removed it
            gone.append(path)
            raise FileExistsError(path)
        make(path, mode, exist_ok)

    monkeypatch.setattr(os, "makedirs", makedirs)
    read(opened(root), "a")
    assert gone
    assert fetched(root) == "a"


@pytest.mark.parametrize("waits", [True, False])
def test_another_process_takes_over_from_one_that_dies(waits, root):
    storage = opened(root)
    storage._filesystem.deadly, storage._filesystem.seconds = True, 0.3
    dead = FORK.Process(target=read, args=(storage, "a"))
    dead.start()
    while not fetched(root):
        time.sleep(0.01)
    if not waits:
        dead.join()
    read(opened(root), "a")
    dead.join()
    assert (dead.exitcode, fetched(root)) == (-signal.SIGKILL, "aa")
    assert os.listdir(root.parent / "cache") == ["copies"]


def test_what_was_used_longest_ago_makes_room(root):
    storage = opened(root, files=3)
    for name in "abcad":
        read(storage, name)
    assert copies(root) == ["a", "c", "d"]
    read(storage, "b")
    assert copies(root) == ["a", "b", "d"]
    assert fetched(root) == "abcdb"


def test_a_mapped_copy_is_read_on_after_it_was_evicted(root):
    storage = opened(root, files=1)
    with storage.reading("a") as path, open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read(storage, "b")
    assert copies(root) == ["b"]
    assert mapped[:] == b"a" * SIZE


def test_a_copy_that_is_being_opened_stays(root):
    storage = opened(root, files=1)
    with storage.reading("a") as path:
        read(storage, "b")
        assert Path(path).read_bytes() == b"a" * SIZE
    read(storage, "c")
    assert copies(root) == ["c"]


def test_only_copies_of_remote_files_are_evicted(root):
    storage = opened(root, files=1)
    others = [root.parent / "cache/decoding-1.so", root.parent / "cache/journals/x/id"]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(bytes(5 * SIZE))
    for name in "ab":
        read(storage, name)
    assert copies(root) == ["b"]
    assert all(other.exists() for other in others)


def test_by_default_the_copies_leave_as_much_free_as_they_take(root, monkeypatch):
    disk = 4.5 * SIZE
    taken = lambda: sum(each.stat().st_size for each in (root.parent / "cache").rglob("*") if each.is_file())  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(disk - taken())))
    for name in "abcd":
        read(opened(root), name)
    assert copies(root) == ["c", "d"]
    disk = 1.5 * SIZE  # a file that fits the disk is not refused
    read(opened(root), "a")
    assert copies(root) == ["a"]


def test_a_bound_below_one_file_is_one_sentence(root):
    with pytest.raises(UserError, match=rf"The file {root}/a needs 0.00 GiB .* raise --cache-gib to at least 0.01\."):
        read(opened(root, files=0.5), "a")
    assert (fetched(root), copies(root)) == ("", [])
    with pytest.raises(UserError, match=r"cache_gib must be above 0, .*, not -1"):
        from_dict(Recipe, {"cache_gib": -1}).check()


def test_the_bound_reaches_other_machines(root):
    assert from_dict(Recipe, {"cache_gib": 0.5}).cache_bytes == 2**29
    plain = Storage(str(root), cache_bytes=7)
    shared = plain.through(HeadFileSystem(None, "head"), str(root / ".not there"))
    for storage in (shared, opened(root, files=0.007) / "below"):
        there = pickle.loads(pickle.dumps(storage))
        assert (there.is_local, there._cache.limit) == (False, 7)


def test_a_copy_that_vanishes_or_is_damaged_is_fetched_again(root):
    storage = opened(root)
    copy = Path(storage.local("a"))
    copy.write_bytes(b"damaged")
    assert Path(storage.local("a", again=True)).read_bytes() == b"a" * SIZE
    copy.unlink()
    read(storage, "a")
    assert fetched(root) == "aaa"


def test_what_was_used_before_the_machines_last_start_makes_room_first(root):
    storage = opened(root, files=3)
    for name in "abc":
        read(storage, name)
    long_ago = time.monotonic_ns() + 10**15  # of a start that had lasted longer
    os.utime(storage.local("c"), ns=(long_ago, long_ago))
    read(storage, "d")
    assert copies(root) == ["a", "b", "d"]
