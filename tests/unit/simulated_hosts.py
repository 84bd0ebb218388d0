"""Hosts, seats and nodes that are made up, in made-up time: they answer the real decisions of the coordinator."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.elastic.decisions import commands
from cluster.elastic.decisions.commands import Command
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.known import WATCH_SECONDS, HostRecord, Known
from cluster.elastic.decisions.observations import (
    AddressGiven,
    BeatHeard,
    Flushed,
    HostFailed,
    HostPrepared,
    MemberEnded,
    NodesSeen,
    Observation,
    Offered,
    RunStopped,
    SeatTaken,
    Tick,
)
from cluster.elastic.events import Event, HostJoined, HostLeft, HostStarted, HostStarting, MembershipFormed, Message
from cluster.elastic.membership import HostInfo, Membership, Outcome, Seat, StateId
from cluster.elastic.workload import Beat, Stage
from cluster.machines.scaling import ScalingRecipe

LATENCY = 0.01  # seconds until an answer is there
NOTICE_SECONDS = 0.2  # until a member's connections to a lost one break
DIED = HostFailed("", "ActorDiedError", died=True)


@dataclass(eq=False)
class SimulatedHost:
    """A host that steps until its membership ends.

    Args:
        start_error: what its preparation fails with.
        stage: its own in a membership.
        waiting: whether it waits for other members there.
        step_s: seconds of its last step.
        enter_s: seconds that it took to enter its membership.
        moves: whether its progress grows.
        notices: whether it ends a membership that has lost a member by itself.
        heeds: whether it ends one when it is told to abort.
        silent: its process is stopped: it does not answer until `Simulation.wake`.
        gone: its machine is, and nobody was told.
        delay: seconds that its beats take besides.
        dead: its process is gone, whether killed from outside or by the coordinator.
        killed: by the coordinator.
        aborted: memberships that it was told to abort.
    """

    name: str
    node: str
    pid: int
    start_error: HostFailed | None = None
    ready: bool = False
    stage: Stage = Stage.STEPPING
    waiting: bool = False
    step_s: float = 1.0
    enter_s: float = 0.3
    moves: bool = True
    step: int = 0
    held: StateId | None = None
    notices: bool = True
    heeds: bool = True
    silent: bool = False
    gone: bool = False
    delay: float = 0.0
    dead: bool = False
    killed: bool = False
    membership: Membership | None = None
    aborted: list[int] = field(default_factory=list)
    owed: list[Observation] = field(default_factory=list)  # answers that wait for it to wake

    def beat(self, now: float) -> Beat:
        number = self.membership.number if self.membership else 0
        stage = self.stage if self.membership else Stage.IDLE
        progress = int(10 * now) if self.moves else 0
        return Beat(stage, stage.value, self.waiting, number, self.step, self.step_s, progress, self.held, self.enter_s)


class Simulation:
    """Seats on some nodes, whose hosts start within ``start_s`` seconds, and the coordinator's decisions about them.

    Args:
        nodes: one seat each, by the nodes' names of one letter.
        start_s: seconds that a host takes to start.
    """

    def __init__(self, nodes: str = "ab", start_s: float = 2.0, **scaling):
        self.known = Known(ScalingRecipe(**{"num_workers": (1, 2)} | scaling))
        self.now = 100.0
        self.start_s = start_s
        self.hosts: dict[str, SimulatedHost] = {}  # all that were ever started, by name
        self.memberships: dict[int, Membership] = {}
        self.events: list[Event] = []
        self.done: list[tuple[float, Command]] = []  # all commands and when they came
        self.commits: list[str] = []  # hosts that were told to commit what they hold
        self.reason: str | None = None  # why the run was stopped
        self.finished = False
        self.start_errors: dict[str, HostFailed] = {}  # by node
        self.slow_starts: dict[str, float] = {}  # seconds, by node
        self.room: dict[str, int] = {}  # hosts for which a node has memory
        self.draining: set[str] = set()
        self.dead: set[str] = set()  # nodes
        self.dying: set[str] = set()  # nodes that are found dead when a host is to start there
        self.storage_trouble = ""
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.sit(nodes)
        self._tick()

    # ---------------------------------------------------------------- time

    def run(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._until(self.now + seconds, lambda: False)

    def until(self, condition: Callable[[], object], within_s: float = 120.0) -> float:
        """Let time pass until the condition holds; returns the seconds that took. Fails after ``within_s``."""
        began = self.now
        assert self._until(began + within_s, condition), f"waited {within_s} s; the run says {self.reason}"
        return self.now - began

    def _until(self, end: float, condition: Callable[[], object]) -> bool:
        while not (holds := bool(condition())) and self._due and self._due[0][0] <= end:
            self.now, _, happen = heapq.heappop(self._due)
            happen()
        if not holds:
            self.now = end
        return holds

    def later(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), happen))

    def _tick(self) -> None:
        self.observe(Tick())
        if not self.finished:
            self.later(WATCH_SECONDS, self._tick)

    # ---------------------------------------------------------------- what happens

    def sit(self, nodes: str) -> None:
        """A worker group of Ray Train with a seat on each of these nodes is there."""
        for rank, node in enumerate(nodes):
            self.observe(SeatTaken(Seat(f"group {nodes}", rank, len(nodes), node)))

    def kill(self, host: SimulatedHost) -> None:
        """The host's process dies; its node's Ray tells at once."""
        host.dead = True
        self.later(LATENCY, lambda: self.observe(HostFailed(host.name, DIED.error, died=True)))
        self._break(host)

    def end(self, host: SimulatedHost, outcome: Outcome) -> None:
        """The host ends its membership."""
        if host.membership is not None and not host.dead:
            host.membership = None
            self._answer(host, MemberEnded(host.name, outcome))

    def finish(self) -> None:
        """All members make the last step."""
        for host in self.members():
            self.end(host, Outcome("finished", host.step + 1))
        self.until(lambda: self.finished, 5)

    def stop(self) -> None:
        """Somebody else ends the run."""
        self.observe(RunStopped())

    def wake(self, host: SimulatedHost) -> None:
        """A silent host answers all that it was asked."""
        host.silent, owed, host.owed = False, host.owed, []
        for answer in owed:
            self._answer(host, answer)

    # ---------------------------------------------------------------- looking

    def at(self, node: str, number: int) -> SimulatedHost:
        """The host of a node in a membership."""
        return next(self.hosts[member.host] for member in self.memberships[number].members if member.node == node)

    def nodes(self, number: int) -> set[str]:
        return {member.node for member in self.memberships[number].members}

    def members(self) -> list[SimulatedHost]:
        """The hosts that are in a membership now."""
        return [host for host in self.hosts.values() if host.membership and not host.dead]

    def formed(self, number: int) -> Callable[[], bool]:
        return lambda: number in self.memberships

    def spare(self, node: str) -> SimulatedHost:
        """The spare of a node, once it is ready."""

        def spares() -> list[SimulatedHost]:
            alive = (host for host in self.hosts.values() if host.node == node and not host.dead)
            return [host for host in alive if host.ready and not host.membership]

        self.until(spares)
        return spares()[0]

    def record(self, host: SimulatedHost) -> HostRecord:
        """What the coordinator knows of a host."""
        return self.known.hosts[host.name]

    def messages(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Message)]

    def starts(self) -> dict[str, bool]:
        """Whether each host that was started replaces a lost one, by name."""
        return {event.host: event.replaces for event in self.events if isinstance(event, HostStarting)}

    def started(self) -> set[str]:
        return {event.host for event in self.events if isinstance(event, HostStarted)}

    def comings_and_goings(self) -> list[tuple[str, str]]:
        return [(type(e).__name__, e.host) for e in self.events if isinstance(e, HostJoined | HostLeft)]

    def formations(self) -> list[MembershipFormed]:
        return [event for event in self.events if isinstance(event, MembershipFormed)]

    # ---------------------------------------------------------------- the machinery

    def observe(self, observation: Observation) -> None:
        for command in decide(self.known, observation, self.now):
            self.done.append((self.now, command))
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case commands.StartHost(name, node):
                self._start(name, node)
            case commands.KillHost(name):
                host = self.hosts[name]
                host.dead = host.killed = True
                self._break(host)
            case commands.AskForBeat(name):
                host = self.hosts[name]
                self.later(host.delay, lambda: self._answer(host, BeatHeard(name, host.beat(self.now))))
            case commands.AskForOffer(name):
                host = self.hosts[name]
                self._answer(host, Offered(name, host.held, self.storage_trouble, copied=True))
            case commands.AskForAddress(name):
                self._answer(self.hosts[name], AddressGiven(name, ("127.0.0.1", 1)))
            case commands.RunMember(name, membership):
                self.memberships[membership.number] = membership
                self.hosts[name].membership = membership
            case commands.AskToLeave(name):
                self.end(self.hosts[name], Outcome("left", self.hosts[name].step))
            case commands.Abort(name, number):
                host = self.hosts[name]
                host.aborted.append(number)
                if host.heeds:
                    self.later(LATENCY, lambda: self._ends_broken(host, number))
            case commands.Commit(name):
                self.commits.append(name)
            case commands.Flush(name):
                self._answer(self.hosts[name], Flushed(name))
            case commands.LookAtNodes(asked):
                seen = NodesSeen(asked, frozenset(self.draining), frozenset(self.dead))
                self.later(LATENCY, lambda: self.observe(seen))
            case commands.Post(event):
                self.events.append(event)
            case commands.StopRun(reason):
                self.reason = self.reason or reason
            case commands.Finish():
                self.finished = True

    def _start(self, name: str, node: str) -> None:
        here = sum(host.node == node and not (host.dead or host.start_error) for host in self.hosts.values())
        host = self.hosts[name] = SimulatedHost(name, node, pid=len(self.hosts) + 1)
        host.start_error = self.start_errors.get(node)
        if here >= self.room.get(node, 9):
            host.start_error = HostFailed("", "MemoryError", "too little memory")
        if node in self.dying:
            self.dead.add(node)
            host.start_error = HostFailed("", "ActorUnschedulableError", "The node is gone.")
        if host.start_error is not None:
            self._answer(host, HostPrepared(name, HostInfo(host.pid, node, "127.0.0.1")))
            return

        def prepared() -> None:
            host.ready = True
            self._answer(host, HostPrepared(name, HostInfo(host.pid, node, "127.0.0.1")))

        self.later(self.slow_starts.get(node, self.start_s), prepared)

    def _answer(self, host: SimulatedHost, answer: Observation) -> None:
        def arrive() -> None:
            error = host.start_error or (DIED if host.dead else None)
            if error is not None:
                self.observe(HostFailed(host.name, error.error, error.sentence, error.died, error.user_error))
            elif host.silent:
                host.owed.append(answer)
            else:
                self.observe(answer)

        self.later(LATENCY, arrive)

    def _break(self, lost: SimulatedHost) -> None:
        """The other members notice that one is gone."""
        membership, lost.membership = lost.membership, None
        for host in self.members() if membership else ():
            if host.membership is membership and host.notices:
                self.later(NOTICE_SECONDS, lambda host=host: self._ends_broken(host, membership.number))

    def _ends_broken(self, host: SimulatedHost, number: int) -> None:
        if host.membership is not None and host.membership.number == number:
            self.end(host, Outcome("broken", host.step, "connection closed"))
