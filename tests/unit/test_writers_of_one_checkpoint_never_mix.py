"""On a root without renames a rank 0 that was stopped, and goes on after its successor, spoils no checkpoint."""

import errno
import threading
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from doge.common.storage import Storage
from doge.training.state import checkpoint as checkpoints_module
from doge.training.state.checkpoint import Checkpoints, CorruptCheckpoint, Superseded
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState

NAME, FILES = "step-00000042", ["exp_avg.safetensors", "exp_avg_sq.safetensors", "parameters.safetensors", "state.json"]


class Store(MemoryFileSystem):
    """An object store that tells what is done to it; ``at_file`` is called before the file of that number is put."""

    cachable = False

    def __init__(self, at_file=lambda number: None):
        super().__init__()
        self.done, self.at_file = [], at_file

    def put_file(self, lpath, rpath, **options):
        if Path(lpath).is_file():
            self.at_file(sum(entry in FILES for entry in self.done))
            self.done.append(Path(rpath).name)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value, mode, **options)
        self.done.append(f"{mode} {Path(path).name}")

    def mv(self, path1, path2, **options):
        self.done.append("mv")
        super().mv(path1, path2, recursive=True, **options)


class Plain(Store):
    """One whose driver only looks whether a file exists."""

    protocol = "plain"


class Old(Store):
    """One that does not know how to refuse a file."""

    def pipe_file(self, path, value, mode="overwrite", **options):
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented.")
        super().pipe_file(path, value, mode, **options)


class Renaming(Store):
    atomic_renames = True


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(checkpoints_module, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def writer(tmp_path):
    def open_one(store: Store, say=lambda message: None) -> Checkpoints:
        storage = Storage(f"memory://{tmp_path.name}", cache=str(tmp_path / "cache"), filesystem=store)
        return Checkpoints(storage, say=say)

    yield open_one
    store = MemoryFileSystem()
    store.rm(f"/{tmp_path.name}", recursive=True)


def state(value: float) -> TrainState:
    """Every tensor of one writer has its value."""
    weights = {"weight": torch.full((3, 2), value)}
    return TrainState(42, weights, {moment: {"weight": torch.full((3, 2), value)} for moment in MOMENTS})


AT = RunPosition("feed", "tokenizer")


def save(checkpoints: Checkpoints, value: float, check=lambda: None) -> None:
    checkpoints.save(state(value), AT, before_commit=check)
    checkpoints.wait()


def values(checkpoints: Checkpoints) -> set[float]:
    """The values of all tensors that are read back."""
    found, _ = checkpoints.load(42)
    return {float(tensor) for part in (found.parameters, *found.moments.values()) for tensor in part["weight"].ravel()}


def test_the_check_comes_after_the_upload_and_the_manifest_last_and_alone(writer):
    store = Store()
    checkpoints = writer(store)
    save(checkpoints, 1.0, check=lambda: store.done.append("check"))
    assert sorted(store.done[:4]) == FILES
    assert store.done[4:] == ["check", "create manifest.json"]
    assert (values(checkpoints), checkpoints.committed) == ({1.0}, 42)


def test_where_there_are_renames_the_check_comes_between_the_upload_and_the_rename(writer):
    store = Renaming()
    save(writer(store), 1.0, check=lambda: store.done.append("check"))
    assert sorted(store.done[:5]) == sorted([*FILES, "manifest.json"])
    assert store.done[5:] == ["check", "mv"]


def test_a_local_checkpoint_is_flushed_before_the_check(tmp_path, monkeypatch):
    from doge.common.storage import local_files

    done = []
    flush = local_files._flush
    monkeypatch.setattr(local_files, "_flush", lambda path: (done.append("flush"), flush(path)))
    save(Checkpoints(Storage(str(tmp_path))), 1.0, check=lambda: done.append("check"))
    assert done == ["flush", "check"]


class Stopped:
    """Stops a writer at a place until it may go on."""

    def __init__(self):
        self.here, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.here.set()
        assert self.go_on.wait(20)


def test_a_writer_that_was_stopped_amid_its_upload_is_refused_and_leaves_nothing(writer):
    stopped, refused = Stopped(), []

    def check():
        refused.append(True)
        raise Superseded

    stale = writer(Store(lambda number: stopped() if number == 2 else None))
    stale.save(state(1.0), AT, before_commit=check)
    assert stopped.here.wait(20)
    successor = writer(Store())
    save(successor, 2.0)
    stopped.go_on.set()
    stale.wait()
    assert (refused, stale.committed, values(successor)) == ([True], None, {2.0})
    assert len(successor.storage.names(NAME)) == 2  # a manifest and the files of one


@pytest.mark.parametrize("kind", [Store, Plain, Old])
def test_a_writer_that_was_stopped_after_its_check_replaces_nothing(kind, writer):
    stopped, said = Stopped(), []
    stale, successor = writer(kind()), writer(kind(), said.append)
    stale.save(state(1.0), AT, before_commit=stopped)
    assert stopped.here.wait(20)
    save(successor, 2.0)
    stopped.go_on.set()
    stale.wait()
    assert (stale.committed, values(successor)) == (None, {2.0})
    assert len(successor.storage.names(NAME)) == 2
    save(successor, 2.0)
    told = ["cannot refuse a second writer of a checkpoint: end a process" in message for message in said]
    assert told == ([] if kind is Store else [True])


def test_two_that_look_at_the_same_moment_still_mix_nothing(writer):
    class Racing(Plain):
        looked = False

        def exists(self, path, **options):
            if path.endswith("manifest.json") and not self.looked:
                self.looked = True
                return False
            return super().exists(path, **options)

    stopped = Stopped()
    stale, successor = writer(Racing()), writer(Plain())
    stale.save(state(1.0), AT, before_commit=stopped)
    assert stopped.here.wait(20)
    save(successor, 2.0)
    stopped.go_on.set()
    stale.wait()
    assert values(successor) == {1.0}


def test_a_manifest_whose_answer_was_lost_is_written_again(writer):
    class Losing(Store):
        lost = False

        def pipe_file(self, path, value, mode="overwrite", **options):
            super().pipe_file(path, value, mode, **options)
            if not self.lost:
                self.lost = True
                raise OSError(errno.ECONNRESET, "Connection reset by peer")

    checkpoints = writer(Losing())
    save(checkpoints, 1.0)
    assert (checkpoints.committed, checkpoints.attempts, values(checkpoints)) == (42, 2, {1.0})


def test_a_damaged_checkpoint_is_replaced_and_an_earlier_layout_is_read(writer, tmp_path):
    local = Checkpoints(Storage(str(tmp_path / "local")))
    save(local, 3.0)
    checkpoints = writer(Store())
    for name in local.storage.names(NAME):
        checkpoints.storage.write_bytes(f"{NAME}/{name}", local.storage.read_bytes(f"{NAME}/{name}"))
    assert values(checkpoints) == {3.0}
    checkpoints.storage.write_bytes(f"{NAME}/parameters.safetensors", b"damaged")
    with pytest.raises(CorruptCheckpoint):
        checkpoints.load(42)
    save(checkpoints, 4.0)
    assert (checkpoints.committed, values(checkpoints)) == (42, {4.0})


def test_one_that_replaces_a_damaged_checkpoint_gives_way_to_another(writer):
    first, stopped = writer(Store()), Stopped()
    save(first, 1.0)
    stale, successor = writer(Store()), writer(Store())
    stale.save(state(2.0), AT, before_commit=stopped)
    assert stopped.here.wait(20)
    save(successor, 3.0)
    stopped.go_on.set()
    stale.wait()
    assert (stale.committed, values(successor)) == (None, {3.0})
