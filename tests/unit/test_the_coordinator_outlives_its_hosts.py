"""Deaths that meet the coordinator at an awkward moment, which a cluster shows only now and then: its hosts and nodes
are simulated here, its own code runs as it is."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.elastic import coordinator as coordinators
from cluster.elastic import host_pool
from cluster.elastic.coordinator import Coordinator
from cluster.elastic.host import HostConfig
from cluster.elastic.membership import HostInfo, Membership, Offer, Outcome, Seat
from cluster.runs.recipe import ScalingRecipe
from cluster.workloads.membership_loop import MembershipLoop
from cluster.workloads.worker import Worker
from data_pipelines.order.feed import ReadAhead
from doge.common.storage import StorageError

LIMIT = 20.0  # seconds for what takes less than two


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
        return Method(value) if asyncio.iscoroutinefunction(value) and not name.startswith("_") else value


class Board(Actor):
    def __init__(self):
        self.posts: list[tuple[str, Any]] = []
        self.reason: str | None = None

    async def post(self, kind: str, content: Any) -> None:
        self.posts.append((kind, content))

    async def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    async def stopped(self) -> str | None:
        return self.reason


class SimulatedHost(Actor):
    """A host that steps until it is told how its membership ends."""

    def __init__(self, name: str, node: str, simulation: "Simulation"):
        self.name, self.node, self.simulation = name, node, simulation
        self.membership: Membership | None = None
        self.outcome: asyncio.Future = asyncio.get_running_loop().create_future()
        self.killed = asyncio.Event()
        self.start_error = simulation.start_errors.get(node)
        self.silent = False  # it is dead or stopped, and nobody has told
        self.seconds = 0.0  # in its phase
        self.waiting = False  # for others of its membership
        self.delay = 0.0  # of its answers
        self.phase = "step"  # in a membership
        self.aborted: list[int] = []  # memberships

    async def _answer(self, value: Any) -> Any:
        await asyncio.sleep(self.delay)
        if self.start_error:
            raise self.start_error
        if self.killed.is_set():
            raise ray.exceptions.RayActorError
        while self.silent:
            await asyncio.sleep(0.005)
        return value

    async def prepare(self, config: HostConfig) -> HostInfo:
        return await self._answer(HostInfo(next(self.simulation.numbers), self.node, "127.0.0.1"))

    async def offer(self, copies: bool) -> Offer:
        self.simulation.offers += 1
        return await self._answer(Offer(trouble=self.simulation.storage_trouble))

    async def address(self) -> tuple[str, int]:
        return await self._answer(("127.0.0.1", 1))

    async def run(self, membership: Membership, rank: int, given: Any) -> Outcome:
        self.membership, self.outcome = membership, asyncio.get_running_loop().create_future()
        self.simulation.memberships[membership.number] = {member.host for member in membership.members}
        killed = asyncio.create_task(self.killed.wait())
        await asyncio.wait({self.outcome, killed}, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if self.killed.is_set():
            raise ray.exceptions.RayActorError
        self.membership = None
        return self.outcome.result()

    async def status(self) -> dict[str, Any]:
        number = self.membership.number if self.membership else 0
        return await self._answer({
            "phase": self.phase if self.membership else "idle", "step": 0, "seconds": self.seconds,
            "waiting": self.waiting, "step_seconds": 0.0, "membership": number, "held": 0,
        })  # fmt: skip

    async def leave(self) -> None:
        if not self.outcome.done():
            self.outcome.set_result(Outcome("left", 0))

    async def abort(self, number: int) -> None:
        self.aborted.append(number)

    async def flush(self) -> None:
        pass


class Simulation:
    """A coordinator with the nodes a and b and a seat on each.

    Args:
        max_failures, num_workers: of the recipe.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, max_failures: int = 8, num_workers: int | tuple[int, int] = (1, 2)
    ):
        self.hosts: list[SimulatedHost] = []
        self.memberships: dict[int, set[str]] = {}  # the hosts' names by number
        self.start_errors: dict[str, Exception] = {}  # by node
        self.room: dict[str, int] = {}  # hosts for which a node has memory
        self.dead_nodes: set[str] = set()
        self.dying: set[str] = set()  # nodes that are found dead when a host is to start there
        self.numbers = itertools.count(1)
        self.storage_trouble = ""
        self.offers = 0  # that were asked for
        self.board = Board()
        monkeypatch.setattr(host_pool, "start_host", self._start)
        monkeypatch.setattr(host_pool, "kill_host", lambda handle, node, pid: handle.killed.set())
        monkeypatch.setattr(host_pool, "draining_and_dead_nodes", lambda: (set(), set(self.dead_nodes)))
        for module in (host_pool, coordinators):
            monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
        monkeypatch.setattr(host_pool, "ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(coordinators, "ABORT_SECONDS", 0.05)
        monkeypatch.setattr(host_pool, "KILL_SECONDS", 0.1)
        scaling = ScalingRecipe(num_workers=num_workers, max_failures=max_failures)
        self.coordinator = Coordinator("simulated", HostConfig(None, None, None, "", None, False, self.board), scaling)

    def _start(self, name: str, node: str) -> SimulatedHost:
        here = sum(host.node == node and not (host.killed.is_set() or host.start_error) for host in self.hosts)
        self.hosts.append(host := SimulatedHost(name, node, self))
        if here >= self.room.get(node, 9):
            host.start_error = ray.exceptions.RayTaskError("prepare", "", MemoryError("too little memory"))
        if node in self.dying:
            self.dead_nodes.add(node)
            host.start_error = ray.exceptions.ActorUnschedulableError("The node is gone.")
        return host

    def run(self, story: Callable[["Simulation"], Coroutine]) -> None:
        """Conduct the run while ``story`` happens, which ends it."""

        async def both() -> None:
            await self.sit("ab")
            await asyncio.gather(self.coordinator.conduct(), story(self))

        asyncio.run(asyncio.wait_for(both(), LIMIT))

    async def sit(self, nodes: str) -> None:
        """A worker group of Ray Train with a seat on each of these nodes is there."""
        for rank, node in enumerate(nodes):
            await self.coordinator.sit(Seat(f"group {nodes}", rank, len(nodes), node))

    def at(self, node: str, number: int) -> SimulatedHost:
        """The host of a node in a membership."""
        return next(host for host in self.hosts if host.node == node and host.name in self.memberships[number])

    def nodes(self, number: int) -> set[str]:
        return {host.node for host in self.hosts if host.name in self.memberships[number]}

    def messages(self) -> list[str]:
        return [content for kind, content in self.board.posts if kind == "message"]

    def starts(self) -> dict[str, bool]:
        """Whether each host that was started replaces a lost one, by name."""
        return {content[0]: content[1] for kind, content in self.board.posts if kind == "starting"}

    def events(self) -> list[tuple[str, str]]:
        """Hosts that joined and left."""
        return [(kind, content[0]) for kind, content in self.board.posts if kind in ("joined", "left")]

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert self.board.reason is None
            await asyncio.sleep(0.005)

    async def spare(self, node: str) -> SimulatedHost:
        """The spare of a node, once it is ready."""

        def spares() -> list[SimulatedHost]:
            return [host for host in self.hosts if host.node == node and host.name in ready and not host.membership]

        while True:
            ready = {row["host"] for row in await self.coordinator.members()}
            if found := spares():
                return found[0]
            await asyncio.sleep(0.005)

    def later(self, number: int) -> list[int]:
        """Numbers of the memberships after one."""
        return [each for each in self.memberships if each > number]

    def finish(self) -> None:
        for host in self.hosts:
            if host.membership and not host.outcome.done():
                host.outcome.set_result(Outcome("finished", 1))


@pytest.fixture
def simulation(monkeypatch):
    return Simulation(monkeypatch)


def test_a_survivor_that_waited_for_a_lost_one_is_not_taken_for_stuck(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("b")
        victim.killed.set()
        await simulation.until(lambda: ("left", victim.name) in simulation.events())
        survivor.seconds = 1000.0  # it waited long in the collective that has broken, and has not said so yet
        await asyncio.sleep(0.2)
        assert not survivor.killed.is_set()
        survivor.seconds = 0.0
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: 2 in simulation.memberships)
        assert simulation.at("a", 2) is survivor
        simulation.finish()

    simulation.run(story)
    assert len(simulation.memberships[2]) == 2


def test_the_neighbours_of_a_lost_host_must_answer_before_they_are_counted_on(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim, neighbour = simulation.at("a", 1), simulation.at("b", 1), await simulation.spare("b")
        neighbour.silent = True
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: 2 in simulation.memberships)
        assert simulation.memberships[2] == {survivor.name}
        simulation.finish()

    simulation.run(story)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_survivor_that_computes_may_end_its_micro_batch_and_one_that_waits_for_ever_is_replaced(simulation, waiting):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        survivor.waiting = waiting
        await simulation.spare("a")
        await simulation.spare("b")
        victim.killed.set()
        if waiting:
            await simulation.until(lambda: survivor.killed.is_set())
        else:
            await asyncio.sleep(5 * host_pool.KILL_SECONDS)
            assert not survivor.killed.is_set()
            survivor.outcome.set_result(Outcome("broken", 0, "The step was abandoned."))
        await simulation.until(lambda: 2 in simulation.memberships)
        assert (simulation.at("a", 2) is survivor) != waiting
        simulation.finish()

    simulation.run(story)


def test_no_host_starts_on_a_dead_node_and_one_that_just_did_ends_nothing(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("a")
        (await simulation.spare("b")).killed.set()
        simulation.dying.add("b")
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: 2 in simulation.memberships)
        await simulation.until(lambda: "b" in simulation.coordinator._pool._dead)
        assert simulation.nodes(2) == {"a"}
        started = len(simulation.hosts)
        await asyncio.sleep(0.1)
        assert len(simulation.hosts) == started
        survivor.seconds = 1000.0  # without a step: the watch still looks at hosts
        await simulation.until(lambda: survivor.killed.is_set())
        await simulation.until(lambda: 3 in simulation.memberships)
        assert simulation.nodes(3) == {"a"}
        simulation.finish()

    simulation.run(story)
    assert not [message for message in simulation.messages() if message.startswith("No ")]


def test_where_a_node_has_no_memory_for_a_spare_its_worker_is_replaced_all_the_same(monkeypatch):
    simulation = Simulation(monkeypatch, max_failures=1)
    simulation.room["b"] = 1

    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        sentence = "No spare can start on the node b for now: MemoryError: too little memory."
        await simulation.until(lambda: sentence in simulation.messages())
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: any(simulation.nodes(number) == {"a", "b"} for number in simulation.later(1)))
        simulation.finish()

    simulation.run(story)


def test_the_first_hosts_and_spares_replace_nobody_and_later_ones_do(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("a")
        await simulation.spare("b")
        assert list(simulation.starts().values()) == [False] * 4
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: 2 in simulation.memberships)
        await simulation.until(lambda: len(simulation.starts()) == 5)
        simulation.finish()

    simulation.run(story)
    assert list(simulation.starts().values()) == [False] * 4 + [True]
    ready = [content[0] for kind, content in simulation.board.posts if kind == "started"]
    assert set(list(simulation.starts())[:4]) <= set(ready)


def test_a_run_is_not_over_when_rank_0_dies_over_the_last_checkpoint(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        hosts = [simulation.at("a", 1), simulation.at("b", 1)]
        await simulation.spare("a")
        await simulation.spare("b")
        first = hosts[0].membership.members[0].host
        rank_0, other = sorted(hosts, key=lambda host: host.name != first)
        other.outcome.set_result(Outcome("finished", 1))
        await asyncio.sleep(0.05)
        rank_0.killed.set()
        await simulation.until(lambda: 2 in simulation.memberships)
        simulation.finish()

    simulation.run(story)
    assert simulation.board.reason is None


def test_an_answer_that_comes_late_is_still_news(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        host = simulation.at("a", 1)
        host.delay = 1.5 * host_pool.WATCH_SECONDS  # longer than a look waits, shorter than until the next one
        host.seconds = 7.0
        record = next(each for each in simulation.coordinator._pool.members if each.name == host.name)
        await simulation.until(lambda: record.status.get("seconds") == 7.0)
        simulation.finish()

    simulation.run(story)


@pytest.mark.parametrize("error", [OSError, StorageError])
def test_a_node_on_which_nothing_starts_is_left_out_and_the_others_train(monkeypatch, error):
    simulation = Simulation(monkeypatch, max_failures=2)
    simulation.start_errors["b"] = ray.exceptions.RayTaskError("prepare", "", error("No space left on device"))

    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        reason = f"{error.__name__}: No space left on device"
        await simulation.until(simulation.messages)
        assert simulation.messages() == [f"No worker can start on the node b, which is left out: {reason}."]
        assert sum(host.node == "b" for host in simulation.hosts) == 3
        await simulation.spare("a")
        simulation.finish()

    simulation.run(story)
    assert simulation.nodes(1) == {"a"}
    assert simulation.board.reason is None


def test_where_nothing_starts_anywhere_the_run_says_why(monkeypatch):
    simulation = Simulation(monkeypatch, max_failures=0)
    full = ray.exceptions.RayTaskError("prepare", "", OSError("No space left on device"))
    simulation.start_errors = {"a": full, "b": full}

    async def story(simulation: Simulation) -> None:
        pass

    simulation.run(story)
    reason = "No process for the workers could be started: OSError: No space left on device."
    assert simulation.board.reason == reason


def test_an_attempt_to_start_hosts_fails_once_however_many_seats_a_node_has(monkeypatch):
    simulation = Simulation(monkeypatch, max_failures=2)
    simulation.start_errors["b"] = ray.exceptions.RayTaskError("prepare", "", OSError("No space left on device"))

    async def story(simulation: Simulation) -> None:
        await simulation.sit("abbb")
        await simulation.until(simulation.messages)
        assert sum(host.node == "b" for host in simulation.hosts) == 3 * 3
        await simulation.until(lambda: 1 in simulation.memberships)
        simulation.finish()

    simulation.run(story)


def test_where_seats_change_a_node_that_was_left_out_gets_another_chance(monkeypatch):
    simulation = Simulation(monkeypatch, max_failures=0)
    simulation.start_errors["b"] = ray.exceptions.RayTaskError("prepare", "", OSError("No space left on device"))

    async def story(simulation: Simulation) -> None:
        await simulation.until(simulation.messages)
        simulation.start_errors.clear()
        await simulation.sit("abc")
        await simulation.until(
            lambda: any(simulation.nodes(number) == {"a", "b", "c"} for number in simulation.memberships)
        )
        simulation.finish()

    simulation.run(story)


def test_survivors_do_not_wait_for_ever_for_a_node_on_which_nothing_starts(monkeypatch):
    simulation = Simulation(monkeypatch, max_failures=1, num_workers=2)

    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("a")  # no seat is there for it
        simulation.start_errors["b"] = ray.exceptions.RayTaskError("prepare", "", OSError("No space left on device"))
        (await simulation.spare("b")).killed.set()
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))

    simulation.run(story)
    reason = "No process for the workers could be started: OSError: No space left on device."
    assert simulation.board.reason == reason


@pytest.mark.parametrize("passes", [False, True])
def test_a_storage_that_cannot_tell_the_newest_state_is_asked_again_and_ends_no_host(monkeypatch, passes):
    simulation = Simulation(monkeypatch, max_failures=3)
    simulation.storage_trouble = "The storage does not answer."

    async def story(simulation: Simulation) -> None:
        await asyncio.sleep(0)
        if passes:
            await simulation.until(lambda: simulation.offers == 2)
            simulation.storage_trouble = ""
            await simulation.until(lambda: 1 in simulation.memberships)
            await simulation.spare("a")
            await simulation.spare("b")
            assert not any(host.killed.is_set() for host in simulation.hosts)
            simulation.finish()

    simulation.run(story)
    told = [message for message in simulation.messages() if message.startswith("The workers could not meet")]
    assert told == ["The workers could not meet: The storage does not answer."] * (2 if passes else 4)
    assert len([host for host in simulation.hosts if not host.start_error]) == (4 if passes else 2)
    assert (simulation.board.reason is None) == passes
    assert passes or "failed 4 times" in simulation.board.reason


def test_a_host_that_was_silent_and_then_hangs_is_replaced(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("a")
        await simulation.spare("b")
        survivor.waiting = survivor.silent = True
        await asyncio.sleep(2 * host_pool.ANSWER_SECONDS)
        victim.killed.set()
        await simulation.until(lambda: 2 in simulation.memberships)
        assert survivor.aborted == [1]  # it reads that when it wakes
        assert not survivor.killed.is_set()
        survivor.silent = False
        await simulation.until(lambda: survivor.killed.is_set())
        assert survivor.name not in simulation.memberships[2]
        simulation.finish()

    simulation.run(story)


@pytest.mark.parametrize("phase", ["engine", "data", "evaluation", "commit"])
def test_a_survivor_with_something_else_to_do_is_not_replaced_for_it(simulation, phase):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("b")
        survivor.phase = phase
        victim.killed.set()
        await asyncio.sleep(5 * host_pool.KILL_SECONDS)
        assert survivor.aborted == [1]
        assert not survivor.killed.is_set()
        survivor.outcome.set_result(Outcome("broken", 0, "The membership was abandoned."))
        await simulation.until(lambda: 2 in simulation.memberships)
        assert simulation.at("a", 2) is survivor
        simulation.finish()

    simulation.run(story)


def test_what_starts_on_a_new_node_after_a_loss_was_made_good_replaces_nobody(simulation):
    async def story(simulation: Simulation) -> None:
        await simulation.until(lambda: 1 in simulation.memberships)
        survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
        await simulation.spare("a")
        await simulation.spare("b")
        victim.killed.set()
        survivor.outcome.set_result(Outcome("broken", 0, "connection closed"))
        await simulation.until(lambda: len(simulation.starts()) == 5)
        await simulation.until(lambda: 2 in simulation.memberships)
        await simulation.sit("abc")
        await simulation.until(lambda: len(simulation.starts()) == 6)
        simulation.finish()

    simulation.run(story)
    assert list(simulation.starts().values())[:6] == [False] * 4 + [True, False]


def test_a_watch_that_fails_ends_the_run_with_its_reason(monkeypatch):
    simulation = Simulation(monkeypatch)

    def fail() -> None:
        raise ConnectionError("the head is gone")

    monkeypatch.setattr(host_pool, "draining_and_dead_nodes", fail)

    async def story(simulation: Simulation) -> None:
        pass

    with pytest.raises(ConnectionError):
        simulation.run(story)
    assert simulation.board.reason == "The coordinator of the run failed: ConnectionError('the head is gone')."
    assert simulation.hosts
    assert all(host.killed.is_set() for host in simulation.hosts)


def test_a_word_to_abort_meets_the_membership_that_it_names_and_no_other():
    engine = EngineStub()
    worker = object.__new__(Worker)
    worker._membership = loop = MembershipLoop(
        SimpleNamespace(recipe=None, board=None, reader=None), Membership(2, (), ("127.0.0.1", 1), ""), 0
    )
    loop._read_ahead = ReadAhead(lambda *_: None, [(0, 1)], 1)
    worker.abort(1)
    assert next(loop._read_ahead) is None
    loop.engine = engine
    worker.abort(2)
    assert engine.abandoned
    with pytest.raises(RuntimeError, match="stopped"):
        next(loop._read_ahead)
    worker._membership = None
    worker.abort(2)


class EngineStub:
    abandoned = False

    def abandon(self) -> None:
        self.abandoned = True
