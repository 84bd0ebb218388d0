import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.elastic.membership import StateId
from cluster.workloads.held_state import Held
from cluster.workloads.training_workload import TrainingWorkload
from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError
from doge.training.state import checkpoint as checkpoints_module
from doge.training.state.checkpoint import Checkpoints, CorruptCheckpoint, load_checkpoint
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState


def state(step: int) -> TrainState:
    weights = {"weight": torch.full((3, 2), float(step))}
    return TrainState(step, weights, {moment: {"weight": torch.rand(3, 2)} for moment in MOMENTS})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(checkpoints_module, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(checkpoints_module, "LAST_PAUSE_SECONDS", 0.1)


def at(unit: int = 0, **recipe) -> RunPosition:
    """A position that is told from others by its next unit."""
    return RunPosition("feed", "tokenizer", next_unit=unit, recipe=recipe)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def broken(tmp_path):
    """A root that cannot be used: a file lies where its directory should be."""
    root = tmp_path / "disk"
    root.write_text("")
    return root


def test_a_host_does_not_go_on_from_what_it_holds_where_the_storage_may_have_newer(broken):
    feed = SimpleNamespace(fingerprint="feed")
    checkpoints = Checkpoints(Storage(str(broken)) / "checkpoints")
    workload = TrainingWorkload.__new__(TrainingWorkload)
    workload.settings, workload.checkpoints = SimpleNamespace(phases=[SimpleNamespace(feed=feed)]), checkpoints
    workload.kept, workload.replica = Held.of((state(3), at())), None
    with pytest.raises(StorageError):
        workload.newest_state()
    broken.unlink()
    Checkpoints(Storage(str(broken)) / "checkpoints").save(state(9), at())
    until(checkpoints.steps)
    assert workload.newest_state().id == StateId(9)


def test_training_goes_on_and_the_newest_state_is_written_when_the_storage_is_back(broken):
    said = []
    checkpoints = Checkpoints(Storage(str(broken)) / "checkpoints", say=said.append)
    checkpoints.save(state(1), at())
    until(lambda: said)
    started = time.monotonic()
    for step in (2, 3, 4):
        checkpoints.save(state(step), at(step))
        checkpoints.check()
    assert time.monotonic() - started < 0.5  # nothing waits for a storage that fails
    assert checkpoints.committed is None
    broken.unlink()
    checkpoints.wait(timeout=20)
    assert checkpoints.steps()[-1] == 4
    assert not {2, 3} & set(checkpoints.steps())
    assert checkpoints.committed == 4
    assert checkpoints.committed == 4
    assert len(said) == 2
    assert said[0].startswith(f"The checkpoint of step 1 cannot be written (The storage {broken}/checkpoints cannot be")
    assert said[0].endswith("training goes on and it is tried again until it can.")
    assert "is written: the storage is back after" in said[1]


def test_a_storage_that_stays_away_is_an_error_at_the_end(broken):
    checkpoints = Checkpoints(Storage(str(broken)))
    checkpoints.save(state(7), at())
    with pytest.raises(UserError, match=r"of step 7 could not be written for 0 s \(The storage .* cannot be used"):
        checkpoints.wait(timeout=0.3)
    broken.unlink()
    checkpoints.wait(timeout=20)  # it is still being tried
    assert checkpoints.steps() == [7]


def test_a_storage_that_hangs_holds_no_step_up(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "GRACE_SECONDS", 0.1)
    checkpoints, hang = Checkpoints(Storage(str(tmp_path))), threading.Event()
    monkeypatch.setattr(checkpoints.storage, "sweep", hang.wait)
    started = time.monotonic()
    for step in (1, 2, 3):
        checkpoints.save(state(step), at())
    assert time.monotonic() - started < 1
    with pytest.raises(UserError, match="its storage does not answer"):
        checkpoints.wait(timeout=0.1)
    hang.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


@pytest.mark.slow
def test_a_disk_that_is_full_is_tried_again(tmp_path):
    """A real file system of a few pages, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("the kernel allows no mount namespaces")
    script = f"""
import os, torch
from pathlib import Path
from doge.training.state import checkpoint
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState
from doge.common.storage import Storage
checkpoint.FIRST_PAUSE_SECONDS = 0.1
root, said = Path({str(tmp_path)!r}), []
(root / "ballast").write_bytes(bytes(1_000_000))
def say(message):
    said.append(message)
    (root / "ballast").unlink(missing_ok=True)
weights = {{"weight": torch.zeros(100, 100)}}
checkpoints = checkpoint.Checkpoints(Storage(str(root)) / "run", say=say)
checkpoints.save(TrainState(5, weights, {{moment: weights for moment in MOMENTS}}), RunPosition("feed", "tokenizer"))
checkpoints.wait()
assert "is full: free some space" in said[0], said
assert len(said) == 2 and checkpoints.latest()[0].step == 5
assert os.listdir(root / "run") == ["step-00000005"]
"""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", script]
    subprocess.run(command, check=True, cwd=Path(checkpoints_module.__file__).parents[3])


def test_a_refusal_before_the_commit_is_no_storage_error(tmp_path):
    def refuse():
        raise UserError("the run was taken over")

    checkpoints = Checkpoints(Storage(str(tmp_path)))
    checkpoints.save(state(1), at(), before_commit=refuse)
    with pytest.raises(UserError, match="taken over"):
        checkpoints.wait()
    checkpoints.check()  # raised once
    assert (checkpoints.steps(), checkpoints.committed) == ([], None)


def test_a_storage_error_before_the_commit_is_tried_again(tmp_path):
    answers = iter([StorageError("away."), None])

    def ask():
        if error := next(answers):
            raise error

    checkpoints = Checkpoints(Storage(str(tmp_path)))
    checkpoints.save(state(1), at(), before_commit=ask)
    checkpoints.wait(timeout=20)
    assert checkpoints.committed == 1


def test_an_error_that_no_pause_mends_is_raised_at_once(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    checkpoints.save(state(1), at(broken=object()))
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.wait()


def test_old_checkpoints_that_cannot_be_removed_do_not_undo_a_commit(tmp_path, monkeypatch):
    checkpoints = Checkpoints(Storage(str(tmp_path)), keep=1)
    checkpoints.save(state(1), at())
    checkpoints.wait()
    monkeypatch.setattr(checkpoints.storage, "delete", lambda name: (_ for _ in ()).throw(StorageError("busy.")))
    checkpoints.save(state(2), at())
    checkpoints.wait()
    assert (checkpoints.committed, checkpoints.steps()) == (2, [1, 2])


@pytest.fixture
def remote(tmp_path):
    storage = Storage(f"memory://{tmp_path.name}/checkpoints", cache=str(tmp_path / "cache"))
    checkpoints = Checkpoints(storage)
    checkpoints.save(state(1), at())
    checkpoints.wait()
    checkpoints.load(1)
    return storage / "step-00000001"


def stored(remote, name: str) -> str:
    return next(each for each in json.loads(remote.read_bytes("manifest.json")) if each.endswith(name))


@pytest.mark.parametrize("name", ["parameters.safetensors", "exp_avg.safetensors", "state.json"])
def test_a_damaged_copy_in_the_cache_is_fetched_again(name, remote):
    copy = Path(remote.local(stored(remote, name)))
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert torch.equal(load_checkpoint(remote)[0].parameters["weight"], state(1).parameters["weight"])


def test_a_damaged_original_is_found_in_spite_of_the_cache(remote):
    remote.write_bytes(stored(remote, "parameters.safetensors"), b"damaged")
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(remote)


def test_a_step_that_another_machine_wrote_again_is_read_anew(remote, tmp_path):
    elsewhere = Storage(f"memory://{tmp_path.name}/checkpoints", cache=str(tmp_path / "another cache"))
    again = Checkpoints(elsewhere)
    again.save(TrainState(1, {"weight": torch.ones(5)}, {moment: {} for moment in MOMENTS}), at(7))
    again.wait()
    found, position = load_checkpoint(remote)
    assert (found.parameters["weight"].shape, position) == ((5,), at(7))


def test_every_file_is_hashed_once(remote, monkeypatch):
    hashed = []
    sha256 = checkpoints_module.sha256
    monkeypatch.setattr(checkpoints_module, "sha256", lambda path: (hashed.append(path), sha256(path))[1])
    load_checkpoint(remote)
    assert len(hashed) == len(set(hashed)) == 4


def test_what_dead_writers_left_in_the_cache_is_swept(tmp_path):
    """A living writer's staging directory stays, however old."""
    storage = Storage(f"memory://{tmp_path.name}", cache=str(tmp_path))
    abandoned = tmp_path / "dead.partial"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))

    def fill(path):
        os.utime(Path(path).parent, (0, 0))
        storage.write_bytes("b", b"meanwhile")
        Path(path).write_bytes(b"x")

    storage.write("a", fill)
    assert storage.read_bytes("a") == b"x"
    assert os.listdir(tmp_path) == []
