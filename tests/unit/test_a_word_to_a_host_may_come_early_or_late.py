"""A word to a host may come early, before the membership that it is about has begun, or late, in another."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from cluster.elastic import host as hosts
from cluster.elastic.host import Host
from cluster.elastic.membership import Member, Membership, Outcome, StateId
from cluster.workloads import training_workload
from cluster.workloads.held_state import Held
from cluster.workloads.outbox import Outbox
from cluster.workloads.training_loop import TrainingLoop
from cluster.workloads.training_workload import TrainingWorkload
from data_pipelines.order.feed import ReadAhead
from doge.common.errors import UserError
from doge.common.hardware import device_trouble
from doge.common.machine import ASIDE, process_start
from doge.common.storage import StorageError
from doge.training.communicator import CommunicationError
from doge.training.state.run_position import RunPosition


class EngineStub:
    abandoned = False

    def abandon(self) -> None:
        self.abandoned = True


def test_an_abort_meets_the_membership_that_it_names_and_no_other():
    engine, workload = EngineStub(), object.__new__(TrainingWorkload)
    workload.settings = workload.feeds = None
    workload.reporter = SimpleNamespace(post=None)
    workload._loop = loop = TrainingLoop(workload, Membership(2, (), ("127.0.0.1", 1)), 0)
    loop._read_ahead = ReadAhead(lambda *_: None, [(0, 1)], 1)
    workload.abort(1)
    assert next(loop._read_ahead) is None
    loop._engine = engine
    workload.abort(2)
    assert engine.abandoned
    with pytest.raises(RuntimeError, match="stopped"):
        next(loop._read_ahead)
    workload._loop = None
    workload.abort(2)


class Loop(TrainingLoop):
    """One that would step for ever."""

    def enter(self) -> None:
        if not self.abandoned:
            raise ValueError("this membership was not abandoned")
        raise CommunicationError("abandoned")

    def close(self, broken: bool) -> None:
        pass


def workload_of_nothing() -> TrainingWorkload:
    workload = object.__new__(TrainingWorkload)
    workload.settings = workload.feeds = workload._loop = workload.replica = None
    workload.kept, workload._moves, workload._membership, workload._aborted = None, 0, 0, 0
    workload.job, workload.device = SimpleNamespace(use_gpu=False), torch.device("cpu")
    workload.reporter = SimpleNamespace(post=None, outbox=Outbox(lambda events: None))
    return workload


def test_an_abort_that_comes_before_its_membership_begins_is_not_forgotten(monkeypatch):
    assert abandoned_outcome(monkeypatch).kind == "broken"
    workload = workload_of_nothing()
    assert workload.run(Membership(4, (), ("127.0.0.1", 1)), 0, None).kind == "failed"


class Workload:
    """One whose memberships end at once, as whoever asks to leave them wants."""

    def __init__(self, leave: threading.Event):
        self.leave = leave

    def run(self, membership: Membership, rank: int, state: object) -> Outcome:
        return Outcome("left" if self.leave.is_set() else "finished", 0)


def test_a_word_to_leave_is_for_one_membership_also_where_it_comes_before_that_begins():
    host = Host("a1")
    host._workload = Workload(host._leave)

    def run(number: int) -> str:
        return host.run(Membership(number, (Member("a1", "a", "a"),), ("127.0.0.1", 1)), 0, None).kind

    assert run(1) == "finished"
    host.leave(2)
    assert [run(2), run(3)] == ["left", "finished"]
    host.leave(2)
    assert run(4) == "finished"
    host.leave(4)
    assert host._leave.is_set()


@pytest.mark.parametrize(
    ("held", "own", "there", "written"),
    [
        (StateId(7, 2), 5, [5], True),
        (StateId(7, 2), 7, [5], False),  # this host gave it to be written before
        (StateId(7, 2), None, [5, 7], False),  # another did
        (StateId(7, 0), None, [7], False),  # it comes from there
        (StateId(0, 1), None, [], False),  # nothing was learnt yet
        (None, None, [5], False),
        (StateId(7, 2), 5, StorageError("The disk is full."), True),  # the writer tries on
    ],
)
def test_a_host_commits_what_it_holds_where_nobody_did(held, own, there, written):
    workload, saved = object.__new__(TrainingWorkload), []
    position = RunPosition("feed", "tokenizer", next_unit=56)
    workload.kept = held and Held(held, position, lambda: ("state", position))
    workload.replica, workload._moves = None, 0

    def steps() -> list[int]:
        if isinstance(there, Exception):
            raise there
        return there

    def check() -> None:
        raise UserError("An earlier one could not be recorded.")

    workload.checkpoints = SimpleNamespace(steps=steps, check=check, has=lambda step: step == own)
    workload.save = lambda *arguments: saved.append(arguments)
    workload.commit()
    assert saved == ([("state", position, 2)] if written else [])


def test_a_gpu_is_taken_over_once_its_former_process_is_gone(monkeypatch):
    monkeypatch.setattr(hosts, "GONE_SECONDS", 0.3)
    host = Host("a1")
    host._workload = Workload(host._leave)
    former = subprocess.Popen(["sleep", "60"])
    known = former.pid, process_start(former.pid)

    def run(*predecessor: int) -> Outcome:
        member = Member("a1", "a", "a", ("",), predecessor)
        return host.run(Membership(1, (member,), ("127.0.0.1", 1)), 0, None)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused = run(*known)
    assert refused.kind == "unable"
    assert f"in use by process {former.pid}" in refused.reason
    assert run(former.pid, known[1] + 1).kind == "finished"  # another process of that id
    former.kill()
    former.wait()
    assert run(*known).kind == "finished"


def test_a_device_that_fails_the_simplest_sum_ends_its_process(monkeypatch):
    assert device_trouble(torch.device("cpu")) == ""
    assert "its GPU" not in abandoned_outcome(monkeypatch).reason
    monkeypatch.setattr(training_workload, "device_trouble", lambda device: "CUDA error: an illegal memory access")
    outcome = abandoned_outcome(monkeypatch)
    assert outcome.kind == "failed"
    assert "its GPU is not usable any more: CUDA error" in outcome.reason


def abandoned_outcome(monkeypatch) -> Outcome:
    monkeypatch.setattr(training_workload, "TrainingLoop", Loop)
    workload = workload_of_nothing()
    workload.abort(3)
    return workload.run(Membership(3, (), ("127.0.0.1", 1)), 0, None)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a whole process has one priority")
def test_a_spare_prepares_aside_and_trains_with_the_others():
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    host, found, usual = Host("a1"), [], niceness()

    class Job:
        use_gpu = True

        def open(self, name: str, leave: threading.Event) -> object:
            thread = threading.Thread(target=lambda: found.append(niceness()))
            thread.start()
            thread.join()
            return SimpleNamespace(warm_up=lambda: found.append(niceness()))

    host.prepare(Job(), aside=True)
    assert found == [min(usual + ASIDE, 19)] * 2
    assert niceness() == usual
    host.prepare(Job(), aside=False)
    assert found[2:] == [usual] * 2
