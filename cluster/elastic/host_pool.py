"""The pool of a run's hosts: started where there are seats, watched, and ended."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.elastic.events import HostLeft, HostStarted, HostStarting, Message
from cluster.elastic.host import kill_host, start_host
from cluster.elastic.membership import HostInfo, Seat
from cluster.elastic.workload import Beat, Job, Stage
from cluster.machines.scaling import ScalingRecipe
from doge.common.errors import UserError
from doge.common.storage import StorageError

WATCH_SECONDS = 0.5
ANSWER_SECONDS = 3.0  # a host that does not answer for so long is left out of a new membership
FLUSH_SECONDS = 120.0  # for the checkpoint of a host that is no longer needed
RETRY_SECONDS = 600.0  # until a spare is tried again where several could not start
KILL_SECONDS = 6.0  # from a loss until those who cannot be woken from waiting for the lost one are replaced
BUILD_SECONDS = 20.0  # the same of those who build an engine, which may be computing or waiting

Vacancy = tuple[str, bool]
"""A node, and whether a spare is wanted there: where memory is short, the hosts of seats may start and spares not."""


@dataclass(eq=False)
class HostRecord:
    """What the pool knows of a host."""

    name: str
    node: str
    handle: Any
    spare: bool  # it was started to wait
    replaces: bool = False  # it was started for one that was lost
    gpus: tuple[str, ...] | None = None  # None: not bound to any yet
    info: HostInfo | None = None  # once it is ready
    status: Beat = field(default_factory=lambda: Beat(waiting=True))
    busy: bool = False  # a call of its loop is under way
    used: bool = False  # it was in a membership
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""  # why it was lost
    started: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)
    asking: asyncio.Future | None = None  # for its status

    @property
    def alive(self) -> bool:
        return not self.lost.is_set()

    @property
    def ready(self) -> bool:
        return self.info is not None and self.alive

    def silent(self) -> float:
        """Seconds since its last answer."""
        return time.monotonic() - self.answered

    def answers(self) -> bool:
        """Whether it can be counted on right now."""
        return self.silent() < ANSWER_SECONDS

    def computes(self) -> bool:
        """Whether it is within a step and waits for nobody."""
        return self.status.stage is Stage.STEPPING and not self.status.waiting

    def patience(self, hang_timeout_s: float) -> float:
        """Seconds that it has to end a membership that lost another.

        Who waits for the others, and was not woken by now, never will be. Whoever does something of its own ends after
        its micro-batch, or its checkpoint; only on a GPU it may be a collective that the computing waits for.
        """
        step = 3 * self.status.step_seconds
        if self.status.waiting:
            return KILL_SECONDS
        if self.status.stage is Stage.BUILDING:
            return BUILD_SECONDS
        if self.gpus and self.status.stage is Stage.STEPPING:
            return max(KILL_SECONDS, step)
        return max(hang_timeout_s, step)


class HostPool:
    """The hosts of a run. All methods belong to one event loop.

    Args:
        job: for the hosts.
        scaling: how many spares there are, and how patient to be.

    Attributes:
        hosts: all that live, and those of the present membership that were lost, by name.
        seats: where hosts may train.
        members: the hosts of the present membership, in the order of their ranks.
        leaving: nodes that are about to go.
        change: set at whatever may call for another membership.
    """

    def __init__(self, job: Job, scaling: ScalingRecipe):
        self._job, self._scaling, self._board = job, scaling, job.board
        self.hosts: dict[str, HostRecord] = {}
        self.seats: tuple[Seat, ...] = ()
        self.members: list[HostRecord] = []
        self.leaving: set[str] = set()
        self.change = asyncio.Event()
        self._dead: set[str] = set()  # nodes that Ray knows to be gone
        self._failed_starts: Counter[Vacancy] = Counter()  # attempts in a row
        self._failed_at: dict[Vacancy, float] = {}  # monotonic; whoever was started before belongs to that attempt
        self._retry_at: dict[Vacancy, float] = {}  # monotonic; before that none is started
        self._given_up: dict[str, str] = {}  # nodes on which no worker could be started, and why
        self._names = itertools.count(1)
        self._to_replace = 0  # hosts that were lost and in whose place none was started yet
        self._tasks: set[asyncio.Task] = set()

    # ---------------------------------------------------------------- who is there

    def wanted(self) -> list[HostRecord]:
        """The hosts that should train: for every seat a ready one that answers, on a node that stays."""
        chosen: list[HostRecord] = []
        for (node, gpus), number in self._places().items():
            if node in self.leaving:
                continue
            fitting = [
                host for host in self.hosts.values()
                if host.node == node and host.ready and host.gpus in (None, gpus) and host not in chosen
                and (host in self.members or (not host.busy and host.answers()))
            ]  # fmt: skip
            # Those that train go on; then those bound to these GPUs; spares last.
            fitting.sort(key=lambda host: (host not in self.members, host.gpus is None))
            chosen.extend(fitting[:number])
        return chosen

    def starting(self) -> list[HostRecord]:
        return [host for host in self.hosts.values() if host.info is None and host.alive]

    def lost(self) -> list[HostRecord]:
        """Members of the present membership, or of the last one, that were lost."""
        return [host for host in self.hosts.values() if not host.alive]

    def hopeless(self, enough: int) -> str:
        """Why there will never be ``enough`` hosts, as far as the nodes that are there go; empty if there may be."""
        alive = Counter(host.node for host in self.hosts.values() if host.alive)
        seats = Counter(seat.node for seat in self.seats)
        possible = sum(min(number, alive[node]) if node in self._given_up else number for node, number in seats.items())
        reasons = [self._given_up[node] for node in seats if node in self._given_up]
        return reasons[0] if reasons and possible < enough else ""

    def free_gpus(self, host: HostRecord, others: list[HostRecord]) -> tuple[str, ...]:
        """GPUs of a seat on the host's node that none of ``others`` has."""
        taken = {other.gpus for other in others if other is not host and other.node == host.node and other.gpus}
        free = [gpus for node, gpus in self._places() if node == host.node and gpus not in taken]
        return free[0] if free else ()

    def _places(self) -> Counter:
        """How many seats there are at every (node, gpus)."""
        return Counter((seat.node, seat.gpus) for seat in self.seats)

    # ---------------------------------------------------------------- coming and going

    def seat(self, seats: tuple[Seat, ...]) -> None:
        """These are the seats from now on; where no host could be started, it is tried again."""
        self.seats = seats
        self._given_up.clear()
        self._failed_starts.clear()
        self.change.set()

    def employ(self, spares: bool) -> None:
        """Start hosts where seats have too few; with ``spares``, also those, where the hosts of all seats are at work.

        A spare imports for half a minute: beside a host that is about to join it would only slow that one down.
        """
        for node, seats in Counter(seat.node for seat in self.seats).items():
            if node in self.leaving | self._dead:
                continue
            alive = [host for host in self.hosts.values() if host.node == node and host.alive]
            at_work = spares and sum(host in self.members for host in alive) >= seats
            for number in range(len(alive), seats + (self._scaling.warm_spares if at_work else 0)):
                spare = number >= seats
                if (not spare and node in self._given_up) or time.monotonic() < self._retry_at.get((node, spare), 0.0):
                    break
                self._start(node, spare)

    def dismiss(self) -> None:
        """End the hosts that no seat holds any more and that are no spares, after their checkpoint is written."""
        seats = Counter(seat.node for seat in self.seats)
        for node in {host.node for host in self.hosts.values()}:
            room = 0 if node in self.leaving or not seats[node] else seats[node] + self._scaling.warm_spares
            here = [host for host in self.hosts.values() if host.node == node and host.alive]
            here.sort(key=lambda host: host not in self.members)
            for host in here[room:]:
                if host not in self.members:
                    self._begin(self._end(host))

    def lose(self, host: HostRecord, reason: str) -> None:
        """Count a host as lost, and make it so."""
        if not host.alive:
            return
        host.reason = reason
        host.lost.set()
        if reason and host.info is not None:
            self._to_replace += 1
            self._given_up.pop(host.node, None)  # there is room again
        if host.used:
            self._board.post.remote(HostLeft(host.name, time.monotonic()))
        # A stopped process hears no request: only the signal ends it.
        kill_host(host.handle, host.node, host.info.pid if reason and host.info is not None else None)
        if host not in self.members:
            self.hosts.pop(host.name, None)
        self.change.set()

    def forget_lost(self) -> None:
        """The membership of the lost ones has ended."""
        for host in self.lost():
            del self.hosts[host.name]

    def close(self) -> None:
        """End all hosts, and what is done beside the rest."""
        for task in self._tasks:
            task.cancel()
        for host in self.hosts.values():
            kill_host(host.handle, host.node, None)

    def _start(self, node: str, spare: bool) -> None:
        name = f"{node[:6]}-{next(self._names)}"
        host = HostRecord(name, node, start_host(name, node), spare, replaces=self._to_replace > 0)
        self._to_replace -= host.replaces
        self.hosts[name] = host
        self._board.post.remote(HostStarting(name, host.replaces, host.started))
        self._begin(self._prepare(host))

    async def _prepare(self, host: HostRecord) -> None:
        host.info = await self.ask(host, host.handle.prepare.remote(self._job))
        self._board.post.remote(HostStarted(host.name, time.monotonic()))
        if host.info is not None:
            self._failed_starts[host.node, host.spare] = 0
        elif host.reason:  # nobody wanted it to end
            self._to_replace += host.replaces
            await self._note_failed_start(host)
        self.change.set()

    async def _note_failed_start(self, host: HostRecord) -> None:
        """Try again later, or never; a node that is gone is another matter."""
        vacancy, now = (host.node, host.spare), time.monotonic()
        if host.started < self._failed_at.get(vacancy, 0.0):  # it was started beside one whose failure is known
            return
        self._failed_at[vacancy] = now
        self._failed_starts[vacancy] = failures = self._failed_starts[vacancy] + 1
        self._retry_at[vacancy] = now + WATCH_SECONDS * failures
        await self._look_at_nodes()  # that it is gone may be news
        limit = self._scaling.max_failures
        if host.node in self.leaving | self._dead:
            self._failed_starts[vacancy] = 0
        elif 0 <= limit < failures and host.spare:
            self._retry_at[vacancy] = now + RETRY_SECONDS
            if failures == limit + 1:
                self.say(f"No spare can start on the node {host.node[:6]} for now: {host.reason}.")
        elif 0 <= limit < failures:
            self._given_up[host.node] = host.reason
            self.say(f"No worker can start on the node {host.node[:6]}, which is left out: {host.reason}.")

    async def _end(self, host: HostRecord) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(host.handle.flush.remote(), FLUSH_SECONDS)
        self.lose(host, "")

    # ---------------------------------------------------------------- watching

    async def watch(self) -> None:
        """For as long as the run lasts, look at its nodes and hosts."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._look_at_nodes()
            await asyncio.gather(*(self._look_at(host) for host in list(self.hosts.values()) if host.alive))

    async def answering(self, hosts: list[HostRecord]) -> list[HostRecord]:
        """Those that answer now: where one has died, its neighbours on the node may not have been missed yet."""
        answers = await asyncio.gather(*(self._hear(host, ANSWER_SECONDS) for host in hosts))
        return [host for host, answer in zip(hosts, answers, strict=True) if answer]

    async def _look_at_nodes(self) -> None:
        """Hosts of a node that will go soon leave at the next step, with nothing lost, and none is started there."""
        draining, self._dead = await asyncio.to_thread(draining_and_dead_nodes)
        if ours := ({host.node for host in self.hosts.values()} & draining) - self.leaving:
            self.say(f"{len(ours)} of the run's nodes will go soon: its workers leave before.")
        if draining != self.leaving:
            self.leaving = draining
            self.change.set()

    async def _look_at(self, host: HostRecord) -> None:
        """Ask a host how it is; lose it if it has died, or has not answered or moved for too long."""
        await self._hear(host, WATCH_SECONDS)
        patience = self._scaling.hang_timeout_s
        if host.info is not None and host.silent() > patience:
            self.lose(host, f"no answer for {patience:g} seconds")
        stuck = host.status.seconds
        slow = max(patience, 20 * host.status.step_seconds or 10 * patience)
        ending = any(not member.alive for member in self.members)  # who waited for a lost one stops waiting
        if host.computes() and stuck > slow and not ending:
            self.lose(host, f"no progress in a step for {stuck:.0f} seconds")

    async def _hear(self, host: HostRecord, seconds: float) -> bool:
        """Whether a host says how it is within so many seconds; a question that it leaves open stays the only one."""
        if host.asking is not None and host.asking.done():  # how it was, but not that it answers now
            host.status = host.asking.result() or host.status
            host.asking = None
        if host.asking is None:
            host.asking = asyncio.ensure_future(self.ask(host, host.handle.status.remote()))
        asking = host.asking
        done, _ = await asyncio.wait({asking}, timeout=seconds)
        if not done:
            return False
        if host.asking is asking:
            host.asking = None
        host.status = asking.result() or host.status
        return asking.result() is not None

    async def ask(self, host: HostRecord, reference) -> Any:
        """The answer to a call of a host; None if it is lost before."""
        answer = asyncio.create_task(_settled(reference))
        lost = asyncio.create_task(host.lost.wait())
        await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if not answer.done():
            answer.cancel()
            return None
        value, error = answer.result()
        if error is None:
            host.answered = time.monotonic()
            return value
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        sentence = " ".join(str(cause).split())[:300]
        if isinstance(cause, UserError) and not isinstance(cause, StorageError):  # that one may pass
            await self._board.stop.remote(sentence)
        died = isinstance(error, ray.exceptions.RayActorError)
        self.lose(host, "its process died" if died else f"{type(cause).__name__}: {sentence}")
        return None

    # ---------------------------------------------------------------- the rest

    async def wait_for_change(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.change.wait()
        self.change.clear()

    def free_when_done(self, host: HostRecord, call: asyncio.Future) -> None:
        """A silent host's call is still under way: it is busy until that has ended, soon after it answers again."""

        async def release() -> None:
            silent = time.monotonic()  # the last time it was
            while not call.done():
                await asyncio.wait({call}, timeout=WATCH_SECONDS)
                if not host.answers():
                    silent = time.monotonic()
                elif time.monotonic() - silent > host.patience(self._scaling.hang_timeout_s):
                    self.lose(host, "it could not be woken from waiting for a lost one")
            host.busy = False
            self.change.set()

        self._begin(release())

    def say(self, message: str) -> None:
        self._board.post.remote(Message(message))

    def _begin(self, work: Coroutine) -> None:
        """Do this beside the rest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _settled(reference) -> tuple[Any, ray.exceptions.RayError | None]:
    """An answer, or the error that came instead, such as of an actor that cannot start on a node that is gone."""
    try:
        return await reference, None
    except ray.exceptions.RayError as error:
        return None, error


def draining_and_dead_nodes() -> tuple[set[str], set[str]]:
    """Ray's ids of the nodes that will go soon and of those that are gone; one that dies meanwhile is in either."""
    draining = set(ray._private.state.state.get_draining_nodes())
    return draining, {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
