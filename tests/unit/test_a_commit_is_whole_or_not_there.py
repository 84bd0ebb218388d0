import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.training.state.checkpoint import Checkpoints, CorruptCheckpoint, Superseded, load_checkpoint
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState, check_fits


def state(step: int) -> TrainState:
    weights = {"weight": torch.full((3, 2), float(step))}
    return TrainState(step, weights, {moment: {"weight": torch.rand(3, 2)} for moment in MOMENTS})


def at(unit: int = 0, **recipe) -> RunPosition:
    """A position that is told from others by its next unit."""
    return RunPosition("feed", "tokenizer", next_unit=unit, recipe=recipe)


@pytest.fixture(params=["directory", "memory"])
def storage(request, tmp_path):
    if request.param == "directory":
        return Storage(str(tmp_path / "root"))
    return Storage(f"memory://{tmp_path.name}", cache=str(tmp_path / "cache"))


def test_files_are_written_listed_read_and_deleted(storage):
    assert storage.names("a") == []
    storage.write_bytes("a/b.txt", b"one")
    storage.write_bytes("a/b.txt", b"two")
    (storage / "a").write_bytes("c.txt", b"three")
    assert storage.names("a") == ["b.txt", "c.txt"]
    assert storage.read_bytes("a/b.txt") == b"two"
    assert Path(storage.local("a/c.txt")).read_bytes() == b"three"
    assert storage.size("a/c.txt") == 5
    storage.delete("a/c.txt")
    storage.delete("a/c.txt")
    assert not storage.exists("a/c.txt")
    with pytest.raises(FileNotFoundError):
        storage.local("a/c.txt")


def test_a_writer_that_fails_leaves_nothing_and_keeps_what_was_there(storage):
    storage.write_bytes("a/file", b"before")

    def fail(path):
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        storage.write("a/file", fail)
    assert storage.read_bytes("a/file") == b"before"
    assert storage.names("a") == ["file"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(storage):
    storage.write_bytes("a/file", b"before")

    def fill(path):
        Path(path).write_bytes(b"some")
        with open("/dev/full", "wb", buffering=0) as disk:  # the kernel's own full disk
            disk.write(b"more")

    with pytest.raises(UserError, match="is full: free some space") as caught:
        storage.write("a/file", fill)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert storage.read_bytes("a/file") == b"before"
    assert storage.names("a") == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_that_safetensors_meets_is_the_same_sentence(number, storage):
    def fail(path):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    with pytest.raises(UserError, match="is full: free some space"):
        storage.write("a/file", fail)


def test_another_error_of_a_writer_stays_itself(storage):
    def fail(path):
        raise SafetensorError(f"Error while serializing: I/O error: File too large (os error {errno.EFBIG})")

    with pytest.raises(SafetensorError, match="too large"):
        storage.write("a/file", fail)


def write_directory(storage: Storage, name: str, files: dict[str, str]) -> None:
    def fill(path):
        for file, content in files.items():
            target = Path(path, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)

    storage.write(name, fill)


def test_a_directory_replaces_the_one_before_and_its_cached_copies(storage):
    write_directory(storage, "a/folder", {"kept": "before", "gone": "x", "below/kept": "before"})
    (storage / "a").local("folder/below/kept")
    storage.local("a/folder/kept")
    write_directory(storage, "a/folder", {"kept": "after", "below/kept": "after"})
    assert storage.names("a") == ["folder"]
    assert storage.names("a/folder") == ["below", "kept"]
    assert Path(storage.local("a/folder/kept")).read_text() == "after"
    assert Path((storage / "a/folder").local("below/kept")).read_text() == "after"
    if storage.is_local:
        assert os.listdir(storage.path("a")) == ["folder"]
    storage.delete("a")
    with pytest.raises(FileNotFoundError):
        storage.local("a/folder/kept")


def test_a_file_that_is_written_again_is_fetched_again(storage):
    for content in (b"one", b"two"):
        storage.write_bytes("a/file", content)
        assert Path(storage.local("a/file")).read_bytes() == content


def test_a_directory_that_cannot_be_replaced_is_still_there(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    write_directory(storage, "folder", {"file": "before"})

    def fail(*_):
        assert not Path(storage.path("folder")).exists()
        raise OSError(errno.EIO, "no luck")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no luck"):
        write_directory(storage, "folder", {"file": "after"})
    assert storage.read_bytes("folder/file") == b"before"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_root_that_cannot_be_opened_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/doge cannot be opened .*: pip install s3fs on every machine"):
        Storage("s3://bucket/doge")
    with pytest.raises(UserError, match=r"nfs4://x cannot be opened .*: give a directory, or a URI"):
        Storage("nfs4://x")


def test_a_root_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no directory")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        for act in (lambda at: at.write_bytes("a", b""), lambda at: at.read_bytes("a"), lambda at: at.delete("a")):
            with pytest.raises(UserError, match=f"The storage {root} cannot be used"):
                act(Storage(str(root)))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), PermissionError("Forbidden")])
def test_a_root_without_permission_is_one_sentence(error, storage):
    def fail(path):
        raise error

    with pytest.raises(UserError, match=r"cannot be used .*: choose one that you may read and write"):
        storage.write("a/file", fail)


def test_the_newest_checkpoints_are_kept_and_read_back_exactly(storage):
    checkpoints = Checkpoints(storage / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    states = [state(step) for step in (10, 20, 30)]
    for each in states:
        checkpoints.save(each, at(each.step * 8))
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30]
    found, position = checkpoints.latest()
    assert (found.step, position) == (30, at(240))
    assert torch.equal(found.parameters["weight"], states[2].parameters["weight"])
    for moment in MOMENTS:
        assert torch.equal(found.moments[moment]["weight"], states[2].moments[moment]["weight"])


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)), keep=2)
    for step in (10, 20):
        checkpoints.save(state(step), at())
    checkpoints.wait()
    newest = tmp_path / "step-00000020"
    if damage == "truncate":
        os.truncate(newest / "exp_avg.safetensors", 100)
    elif damage == "remove":
        (newest / "parameters.safetensors").unlink()
    else:
        (newest / "manifest.json").unlink()
    assert checkpoints.latest()[0].step == 10
    with pytest.raises(CorruptCheckpoint, match="step-00000020 is incomplete or damaged"):
        load_checkpoint(Storage(str(newest)))


@pytest.mark.parametrize("keep", [1, 2])
def test_only_whole_checkpoints_count_as_kept(keep, storage):
    """A torn one of a later step, as where the run went back to an earlier one, pushes out no whole one."""
    folder = storage / "checkpoints"
    checkpoints = Checkpoints(folder, keep)
    for step in (90, 100, 200):
        checkpoints.save(state(step), at())
        checkpoints.wait()
    folder.delete("step-00000200/manifest.json")
    folder.write_bytes("step-00000095/parameters.safetensors", b"torn")
    checkpoints.save(state(120), at())
    checkpoints.wait()
    assert checkpoints.latest()[0].step == 120
    assert 95 not in checkpoints.steps()
    assert [step for step in checkpoints.steps() if step <= 120] == [100, 120][-keep:]


def test_a_run_none_of_whose_checkpoints_can_be_read_does_not_begin_anew(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    for step in (10, 20):
        checkpoints.save(state(step), at())
        checkpoints.wait()
    for manifest in tmp_path.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match=r"can be read \(2 damaged ones\): bring one back, or remove that directory"):
        checkpoints.latest()


@pytest.mark.parametrize("when", ["before_write", "before_commit"])
def test_a_writer_that_others_have_gone_on_without_publishes_and_removes_nothing(when, tmp_path):
    others = Checkpoints(Storage(str(tmp_path)), keep=3)
    for step in (100, 120):
        others.save(state(step), at())
        others.wait()
    (tmp_path / "step-00000130.partial").mkdir()  # they are writing the next one
    stale = Checkpoints(Storage(str(tmp_path)), keep=1)

    def refuse():
        raise Superseded

    stale.save(state(110), at(), **{when: refuse})
    stale.wait()
    assert stale.committed is None
    assert stale.steps() == [100, 120]
    assert (tmp_path / "step-00000130.partial").exists() == (when == "before_write")


def test_the_record_is_settled_before_the_checkpoint_appears(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    seen = []
    checkpoints.save(state(1), at(), before_commit=lambda: seen.append(checkpoints.steps()))
    checkpoints.wait()
    assert seen == [[]]
    assert checkpoints.steps() == [1]


def test_an_error_of_the_writer_reaches_the_training(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)))

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save(state(1), at(), before_commit=fail)
    with pytest.raises(UserError, match="is full"):
        checkpoints.save(state(2), at())
    assert checkpoints.latest() is None


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(UserError, match="of another model: weight is 3×2 there and 2×2 in the recipe"):
        check_fits(state(1), torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match="bias is missing there and 3 in the recipe"):
        check_fits(state(1), torch.nn.Linear(2, 3))


def test_what_a_killed_writer_left_is_not_seen_and_swept_by_the_next(tmp_path):
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(str(tmp_path),))
    process.start()
    process.join()
    assert len(os.listdir(tmp_path)) == 1
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    assert checkpoints.storage.names() == []
    checkpoints.save(state(1), at())
    checkpoints.wait()
    assert os.listdir(tmp_path) == ["step-00000001"]


def _die_while_writing(root: str) -> None:
    def fill(path: str) -> None:
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    Storage(root).write("step-00000001", fill)
