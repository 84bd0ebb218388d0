"""The coordinator's process around its decisions, with hosts that answer without a cluster."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray

from cluster.elastic import coordinator as coordinators
from cluster.elastic.coordinator import Coordinator, host_failure
from cluster.elastic.events import Message
from cluster.elastic.membership import HostInfo, Membership, Offer, Outcome, Seat, StateId
from cluster.elastic.workload import Beat, Stage
from cluster.machines.scaling import ScalingRecipe
from doge.common.errors import MachineError, UserError
from doge.common.storage import StorageError


class Method:
    """Stands for an actor's method."""

    def __init__(self, call: Callable[..., Coroutine]):
        self._call = call

    def remote(self, *arguments) -> asyncio.Future:
        return asyncio.ensure_future(self._call(*arguments))


class Actor:
    """Stands for a handle: every coroutine of the subclass is called by ``.remote``."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return Method(value) if asyncio.iscoroutinefunction(value) else value


class Board(Actor):
    def __init__(self):
        self.posts, self.reason, self.unavailable = [], None, 0

    async def post(self, event: Any) -> None:
        self.posts.append(event)

    async def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    async def stopped(self) -> str | None:
        if self.unavailable:
            self.unavailable -= 1
            raise ray.exceptions.ActorUnavailableError("its network is slow", None)
        return self.reason


class Host(Actor):
    """One that finishes its first membership, or dies in it where ``dies``."""

    def __init__(self, name: str, dies: bool):
        self.name, self.dies, self.killed, self.given, self.commits = name, dies, False, [], 0

    async def prepare(self, job: Any, aside: bool) -> HostInfo:
        await asyncio.sleep(0.01)
        return HostInfo(1, self.name[0], "127.0.0.1")

    async def status(self) -> Beat:
        return Beat(Stage.IDLE)

    async def offer(self, copy: str) -> Offer:
        return Offer(StateId(5), ("a reference",) if copy == "always" else ())

    async def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def leave(self, number: int) -> None:
        pass

    async def commit(self) -> None:
        self.commits += 1

    async def flush(self) -> None:
        pass

    async def run(self, membership: Membership, rank: int, state: Any) -> Outcome:
        self.given.append(state)
        if self.dies:
            raise ray.exceptions.RayActorError
        return Outcome("broken" if membership.number == 1 else "finished", 6)


@pytest.fixture
def hosts(monkeypatch) -> list[Host]:
    started: list[Host] = []

    def start(name: str, node: str) -> Host:
        started.append(Host(name, dies=name == "b-2"))
        return started[-1]

    monkeypatch.setattr(coordinators, "start_host", start)
    monkeypatch.setattr(coordinators, "kill_host", lambda handle, *_: setattr(handle, "killed", True))
    monkeypatch.setattr(coordinators, "draining_and_dead_nodes", lambda: (set(), set()))
    monkeypatch.setattr(coordinators, "WATCH_SECONDS", 0.02)
    return started


def conduct(board: Board) -> Coordinator:
    async def story() -> Coordinator:
        coordinator = Coordinator("simulated", [None], board, ScalingRecipe(num_workers=2))
        for rank, node in enumerate("ab"):
            await coordinator.sit(Seat("group", rank, 2, node))
        await coordinator.conduct()
        assert await coordinator.over(1.0)
        return coordinator

    return asyncio.run(asyncio.wait_for(story(), 20))


def test_a_run_whose_first_membership_loses_a_host_is_conducted_to_its_end(hosts):
    board = Board()
    conduct(board)
    assert board.reason is None
    assert [type(event).__name__ for event in board.posts].count("MembershipFormed") == 2
    assert [each.given for each in hosts[:3]] == [[None, None], ["a reference"], ["a reference"]]
    assert all(each.killed for each in hosts)


def test_calls_to_ray_that_fail_for_a_while_end_nothing_and_are_told_of(hosts, monkeypatch):
    failures = iter(range(2))

    def fail_at_first() -> tuple[set[str], set[str]]:
        if next(failures, None) is not None:
            raise ConnectionError("the head is slow")
        return set(), set()

    monkeypatch.setattr(coordinators, "draining_and_dead_nodes", fail_at_first)
    monkeypatch.setattr(coordinators, "TELL_SECONDS", 0.0)
    board = Board()
    board.unavailable = 3
    conduct(board)
    assert board.reason is None
    said = [event.text for event in board.posts if isinstance(event, Message)]
    assert said[0] == "Ray does not say which nodes there are (the head is slow): asking on."


def test_an_error_of_the_coordinator_itself_ends_the_run_with_its_reason(hosts, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyError("no such host")

    monkeypatch.setattr(coordinators, "decide", fail)
    board = Board()
    with pytest.raises(KeyError):
        conduct(board)
    assert board.reason == "The coordinator of the run failed: KeyError('no such host')."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.RayActorError(), {"died": True}),
        (ray.exceptions.RayTaskError("prepare", "", OSError("No  space\nleft")), {"sentence": "No space left"}),
        (ray.exceptions.RayTaskError("prepare", "", UserError("No coffee.")), {"user_error": True}),
        (ray.exceptions.RayTaskError("prepare", "", StorageError("No answer.")), {"user_error": False}),
        (
            ray.exceptions.RayTaskError(
                "prepare", "", ray.exceptions.RaySystemError(MachineError("Install it."), "at 1")
            ),
            {"error": "MachineError", "sentence": "Install it.", "user_error": False},
        ),
        (ray.exceptions.RaySystemError("lost"), {"error": "RaySystemError", "sentence": "System error: lost"}),
        (ray.exceptions.ActorUnschedulableError("The node is gone."), {"died": False}),
    ],
)
def test_what_a_failed_call_says_of_its_host(error, said):
    failure = host_failure("a1", error)
    assert {name: getattr(failure, name) for name in said} == said
