import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from doge.common import lease as leases
from doge.common.errors import UserError
from doge.common.lease import FILE, Claim, Lease, LeaseLost
from doge.common.machine import process_start
from doge.common.storage import Storage

INTERVAL = 0.5
OTHERS_INTERVAL = 1.0  # above what SETTLE_SECONDS and a renewal take together, within the patience

HOLD = f"""
import sys, time
from doge.common.lease import Lease
from doge.common.errors import UserError
from doge.common.storage import Storage

root = sys.argv[1]
on_lost = lambda message: print("lost", message, flush=True)
lease = Lease(Storage(root), "the training of other", on_lost, interval={OTHERS_INTERVAL})
print("ready", flush=True)
start = float(sys.stdin.readline())
time.sleep(max(0.0, start - time.time()))
try:
    lease.acquire()
except UserError as error:
    print("refused", error, flush=True)
    sys.exit()
print("held", flush=True)
sys.stdin.readline()
print("still held" if lease.still_held() else "not held any more", flush=True)
lease.release()
"""


def other_process(root: Path) -> subprocess.Popen:
    """One that takes the lease when it is told a time to do so."""
    command = [sys.executable, "-c", HOLD, str(root)]
    repository = Path(leases.__file__).parents[2]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)


def start(processes: list[subprocess.Popen], seconds: float = 0.0) -> None:
    """Let all of them take the lease in ``seconds`` from when the last one is ready."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    at = time.time() + seconds
    for process in processes:
        print(at, file=process.stdin, flush=True)


@pytest.fixture(autouse=True)
def settled_soon(monkeypatch):
    """Nobody starts at the same moment as this process."""
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.1)


@pytest.fixture
def holder(tmp_path):
    with other_process(tmp_path) as process:
        start([process])
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lease(root: Path, **options) -> Lease:
    return Lease(Storage(str(root)), "the training of this", interval=INTERVAL, **options)


def test_a_run_that_is_being_written_is_refused_by_name(holder, tmp_path):
    expected = rf"is being written by the training of other \(process {holder.pid} on .*\): stop that process first"
    with pytest.raises(UserError, match=expected), lease(tmp_path):
        pass
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "still held\n"


def test_a_run_that_has_ended_is_free(holder, tmp_path):
    holder.communicate("\n")
    assert os.listdir(tmp_path) == []
    with lease(tmp_path) as mine:
        assert mine.still_held()
    assert os.listdir(tmp_path) == []


def test_a_killed_holder_of_this_machine_is_replaced_at_once(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 1e9)
    holder.send_signal(signal.SIGKILL)
    while process_start(holder.pid) is not None:  # it stays a zombie, which counts as dead
        time.sleep(0.01)
    with lease(tmp_path) as mine:
        assert mine.still_held()


def test_a_pid_that_another_process_has_now_is_no_holder(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 1e9)
    holder.kill()
    holder.wait()
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | {"pid": os.getpid()}))
    with lease(tmp_path) as mine:
        assert mine.still_held()


@pytest.mark.slow
def test_a_holder_of_another_machine_is_replaced_once_it_is_not_renewed(tmp_path):
    with lease(tmp_path):
        content = json.loads((tmp_path / FILE).read_text())
    foreign = content | {"machine": "another", "host": "another", "pid": 1, "owner": "x"}
    (tmp_path / FILE).write_text(json.dumps(foreign))
    started = time.monotonic()
    with lease(tmp_path) as mine:
        assert mine.still_held()
    assert time.monotonic() - started > 2 * INTERVAL


@pytest.mark.slow
def test_a_clock_that_is_wrong_changes_nothing(tmp_path):
    """The file's time is years off; only whether it changes counts."""
    with lease(tmp_path):
        content = json.loads((tmp_path / FILE).read_text())
        for at in (0, 4e9):
            os.utime(tmp_path / FILE, (at, at))
            with pytest.raises(UserError, match=r"is being written by the training of this"), lease(tmp_path):
                pass
    assert "time" not in content


@pytest.mark.slow
def test_a_holder_that_slept_may_not_commit_after_it_was_replaced(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)  # alive, but as silent as a suspended laptop
    with lease(tmp_path) as mine:
        holder.send_signal(signal.SIGCONT)
        assert holder.stdout.readline().startswith(f"lost The run in {tmp_path} was taken over by the training of this")
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "not held any more\n"
        holder.wait()
        time.sleep(INTERVAL)
        assert mine.still_held()


def test_a_claim_in_another_process_says_why_it_may_not_commit(tmp_path):
    with lease(tmp_path) as mine:
        claim = Claim(Storage(str(tmp_path)), mine.claim.owner)
        claim.check()
    with pytest.raises(LeaseLost, match=r"was removed, .* again to resume from the last commit"):
        claim.check()
    with lease(tmp_path):
        assert not claim.still_held()
        with pytest.raises(LeaseLost, match=r"was taken over by the training of this \(process \d+ on "):
            claim.check()


@pytest.mark.slow
def test_of_processes_that_start_at_the_same_moment_one_wins(tmp_path):
    processes = [other_process(tmp_path) for _ in range(4)]
    start(processes, 0.5)
    said = [process.stdout.readline() for process in processes]
    assert sum(line == "held\n" for line in said) == 1, said
    assert sum(line.startswith("refused") for line in said) == 3
    answers = [process.communicate("\n")[0] for process in processes]
    assert sum("still held" in answer for answer in answers) == 1


@pytest.mark.slow
def test_a_storage_that_fails_for_a_while_loses_no_lease(tmp_path, monkeypatch):
    lost = []
    with lease(tmp_path, on_lost=lost.append) as mine:
        read = Storage.read_bytes
        monkeypatch.setattr(Storage, "read_bytes", lambda *_: (_ for _ in ()).throw(OSError("down")))
        time.sleep(2.5 * INTERVAL)
        monkeypatch.setattr(Storage, "read_bytes", read)
        before = json.loads((tmp_path / FILE).read_text())["counter"]
        time.sleep(2.5 * INTERVAL)
        assert json.loads((tmp_path / FILE).read_text())["counter"] > before
        assert mine.still_held()
        assert lost == []


@pytest.mark.slow
def test_a_damaged_lease_holds_nobody_up_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "INTERVAL_SECONDS", 0.1)
    for content in ("", "{", "[]", "{}", "null"):
        (tmp_path / FILE).write_text(content)
        with lease(tmp_path) as mine:
            assert mine.still_held()
