"""The coordinator: an actor on the driver's node that keeps hosts in the seats and forms one membership after another.

A host that is lost ends its membership for all; the survivors and a warm spare form the next one within a second or two
and go on from the newest state that one of them holds, or from the last checkpoint. A host that comes, or one whose
node is about to go, ends it at a step that all agree on, so that nothing is repeated.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from cluster.host import HostConfig, start_host
from cluster.membership import HostInfo, Member, Membership, Outcome, Seat, node_name

if TYPE_CHECKING:
    from cluster.recipe import ScalingRecipe

NAMESPACE = "doge"
WATCH_SECONDS = 0.5
ANSWER_SECONDS = 3.0  # a host that does not answer for so long is left out of a new membership
ABORT_SECONDS = 2.0  # from a loss until those who still wait for the lost one are woken
KILL_SECONDS = 6.0  # … and until those who cannot be woken are replaced


@dataclass(eq=False)
class HostRecord:
    """What the coordinator knows of a host."""

    name: str
    node: str
    handle: Any
    gpus: tuple[str, ...] | None  # None: a spare, not bound to any yet
    answered: float  # monotonic time of its last answer
    info: HostInfo | None = None  # once it is ready
    status: dict[str, Any] = field(default_factory=dict)
    busy: bool = False  # a call of its loop is under way
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""  # why it was lost
    started: float = field(default_factory=time.monotonic)
    spare: bool = False  # it was started to wait
    used: bool = False  # it was in a membership
    asking: asyncio.Future | None = None  # for its status

    @property
    def ready(self) -> bool:
        return self.info is not None and not self.lost.is_set()

    def silent(self) -> float:
        """Seconds since its last answer."""
        return time.monotonic() - self.answered

    def answers(self) -> bool:
        """Whether it can be counted on right now."""
        return self.silent() < ANSWER_SECONDS


class Coordinator:
    """The actor's class; `open_coordinator` starts one.

    Args:
        name: of the run.
        config: for the hosts.
        scaling: how many there may be, and how patient to be.
        min_workers: fewer wait.
    """

    def __init__(self, name: str, config: HostConfig, scaling: "ScalingRecipe"):
        self.name = name
        self._config, self._scaling, self._board = config, scaling, config.board
        self._hosts: dict[str, HostRecord] = {}
        self._groups: dict[str, dict[int, Seat]] = {}
        self._seats: tuple[Seat, ...] = ()  # of the newest group that is whole
        self._leaving: set[str] = set()  # nodes that are about to go
        self._dead: set[str] = set()  # nodes that Ray knows to be gone
        self._change = asyncio.Event()
        self._over = asyncio.Event()
        self._number = 0
        self._reached = 0  # steps that were made, in whatever membership
        self._at_work = False  # the present membership has taken up the state and steps
        self._failures = 0  # in a row, without a new step
        self._members: list[HostRecord] = []
        self._holder: HostRecord | None = None  # of the newest state
        self._started = 0  # hosts
        self._tasks: set[asyncio.Task] = set()
        self._lost_at: float | None = None

    # ---------------------------------------------------------------- seats

    async def sit(self, seat: Seat) -> None:
        """A worker of Ray Train is there; once its whole group is, the group's seats are those that count."""
        group = self._groups.setdefault(seat.group, {})
        group[seat.rank] = seat
        if len(group) == seat.size:
            self._seats = tuple(group[rank] for rank in range(seat.size))
            self._groups = {seat.group: group}
            self._change.set()

    async def over(self) -> None:
        """Return when the run is over."""
        await self._over.wait()

    # ---------------------------------------------------------------- looking in

    async def members(self) -> list[dict[str, Any]]:
        """The hosts, for whoever wants to see them or, as `cluster.chaos`, to disturb them."""
        ranks = {host: rank for rank, host in enumerate(self._members)}
        return [
            {
                "host": host.name,
                "node": host.node,
                "pid": host.info.pid,
                "rank": ranks.get(host),
                "membership": self._number,
                "step": host.status.get("step", 0),
                "phase": host.status.get("phase", "idle"),
                "leaving": host.node in self._leaving,
            }
            for host in self._hosts.values()
            if host.ready
        ]

    # ---------------------------------------------------------------- the run

    async def conduct(self) -> None:
        """Form memberships until the run is finished or stopped; the board knows why."""
        watch = asyncio.create_task(self._watch())
        try:
            while await self._board.stopped.remote() is None:
                hosts = await self._gather()
                if not hosts or await self._serve(hosts):
                    break
        except Exception as error:
            await self._board.stop.remote(f"The coordinator of the run failed: {error!r}.")
            raise
        finally:
            watch.cancel()
            for host in self._hosts.values():
                ray.kill(host.handle)
            self._over.set()

    async def _gather(self) -> list[HostRecord]:
        """Wait for enough ready hosts: at the start all of the first seats', later the smallest number allowed."""
        while True:
            if await self._board.stopped.remote() is not None:
                return []
            self._employ()
            hosts, starting = self._wanted(), self._starting()
            enough = max(1, min(self._scaling.min_workers, len(self._seats)))
            # Whoever answers late only because its process was just born is worth the wait where nobody else is there.
            if self._seats and len(hosts) >= enough and (self._number > 0 or not starting):
                return hosts
            await self._wait_for_change(WATCH_SECONDS)

    async def _serve(self, hosts: list[HostRecord]) -> bool:
        """One membership, from forming to its end; True if the run is over."""
        began = time.monotonic()
        formed = await self._form(hosts)
        if formed is None:
            return False
        membership, hosts, given, step = formed
        lost_for, self._lost_at = began - self._lost_at if self._lost_at is not None else None, None
        self._members, first = hosts, step
        calls = {}
        for rank, host in enumerate(hosts):
            host.busy = True
            if not host.used:
                host.used = True
                at = time.monotonic() if host.spare else host.started
                content = (host.name, node_name(host.info.machine, host.node), "", at)
                self._board.post.remote("joined", content)
            answer = host.handle.run.remote(membership, rank, None if host.name == membership.source else given)
            calls[asyncio.create_task(self._outcome(host, answer))] = host
        await self._board.post.remote(
            "membership",
            {
                "number": membership.number, "at": began, "world_size": len(hosts), "from_step": step,
                "reached": self._reached, "formed_s": time.monotonic() - began, "lost_s": lost_for,
            },
        )  # fmt: skip
        outcomes = await self._until_ended(calls)
        self._members = []
        return await self._judge(outcomes, first)

    async def _form(self, hosts: list[HostRecord]) -> tuple[Membership, list[HostRecord], Any, int] | None:
        """Let the host with the newest state offer it, and order the hosts behind it; None if one was lost over it."""
        source = self._source(hosts)
        if source in hosts:
            hosts = [source, *(host for host in hosts if host is not source)]
        source.busy = True
        offered = await self._ask(source, source.handle.offer.remote(hosts != [source]))
        source.busy = False
        address = await self._ask(hosts[0], hosts[0].handle.address.remote())
        if offered is None or address is None:
            return None
        step, references = offered
        self._number += 1
        members = []
        for host in hosts:
            host.gpus = host.gpus if host.gpus is not None else self._free_gpus(host, hosts)
            members.append(Member(host.name, host.node, host.info.machine, host.gpus))
        self._reached = max(self._reached, step)
        self._holder = hosts[0]
        membership = Membership(self._number, tuple(members), tuple(address), source.name)
        return membership, hosts, references[0] if references else None, step

    def _source(self, hosts: list[HostRecord]) -> HostRecord:
        """The host to take the state from: the last rank 0, also one that is about to go, or whoever has the newest."""
        idle = [host for host in self._hosts.values() if host.ready and not host.busy and host.answers()]
        if self._holder in idle:
            return self._holder
        return max(idle or hosts, key=lambda host: (host.status.get("held", -1), host in hosts))

    async def _until_ended(self, calls: dict[asyncio.Task, HostRecord]) -> dict[HostRecord, Outcome]:
        """Watch a membership's hosts until each has ended it or is lost."""
        outcomes: dict[HostRecord, Outcome] = {}
        pending = set(calls)
        asked_to_leave, ended_at, woken, self._at_work = False, None, False, False
        while pending:
            change = asyncio.create_task(self._wait_for_change(WATCH_SECONDS))
            done, _ = await asyncio.wait({*pending, change}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            for task in done & pending:
                pending.discard(task)
                outcome = task.result()
                if outcome is not None:
                    outcomes[calls[task]] = outcome
                    calls[task].busy = False
                if outcome is None or outcome.kind in ("broken", "full", "stopped"):
                    ended_at = ended_at or time.monotonic()
            remaining = [calls[task] for task in pending]
            if ended_at is not None:
                self._lost_at = self._lost_at or ended_at
                since = time.monotonic() - ended_at
                if since > ABORT_SECONDS and not woken:
                    woken = True
                    for host in remaining:
                        host.handle.abort.remote()
                # A host that is silent now will find its membership gone when it comes back.
                if remaining and not any(host.answers() for host in remaining):
                    break
                if since > KILL_SECONDS:
                    for host in remaining:
                        if host.answers():
                            self._lose(host, "it could not be woken from waiting for a lost one")
                continue
            if not self._at_work and all(self._steps(host) for host in calls.values()):
                self._at_work = True
                self._dismiss()  # the state has reached all: who had it may go
            self._employ()
            if not asked_to_leave and self._should_change(list(calls.values())):
                asked_to_leave = True
                for host in remaining:
                    host.handle.leave.remote()
        for task in pending:  # silent ones: whatever they say later frees them
            self._begin(self._release(task, calls[task]))
        return outcomes

    async def _judge(self, outcomes: dict[HostRecord, Outcome], first: int) -> bool:
        """Draw the consequences of a membership's end; True if the run is over."""
        kinds = Counter(outcome.kind for outcome in outcomes.values())
        if kinds["finished"] and not kinds["broken"]:
            return True
        if kinds["stopped"]:
            return True
        reached = max([outcome.step for outcome in outcomes.values()], default=first)
        progress, self._reached = reached > self._reached, max(self._reached, reached)
        if kinds["left"] == len(outcomes) and outcomes:
            return False
        reasons = [outcome.reason for outcome in outcomes.values() if outcome.kind == "full"]
        lost = [host for host in self._hosts.values() if host.lost.is_set()]
        reasons += [f"a worker was lost ({host.reason})" for host in lost]
        reasons += [outcome.reason for outcome in outcomes.values() if outcome.kind == "broken"]
        self._say(f"Step {reached + 1:,} was interrupted: {reasons[0] if reasons else 'a worker does not answer'}.")
        for host in lost:
            del self._hosts[host.name]
        self._failures = 0 if progress else self._failures + 1
        limit = self._scaling.max_failures
        if 0 <= limit < self._failures:
            await self._board.stop.remote(
                f"The workers failed {self._failures} times without making a new step ({reasons[0]}): the same command "
                "goes on from the last checkpoint."
            )
            return True
        return False

    # ---------------------------------------------------------------- hosts

    def _wanted(self) -> list[HostRecord]:
        """The hosts that should train: for every seat a ready one that answers, on a node that stays."""
        chosen: list[HostRecord] = []
        for (node, gpus), number in self._places().items():
            if node in self._leaving:
                continue
            fitting = [
                host for host in self._hosts.values()
                if host.node == node and host.ready and host.gpus in (None, gpus) and host not in chosen
                and (host in self._members or (not host.busy and host.answers()))
            ]  # fmt: skip
            # Those that train go on; then those bound to these GPUs; spares last.
            fitting.sort(key=lambda host: (host not in self._members, host.gpus is None))
            for host in fitting[:number]:
                chosen.append(host)
        return chosen

    def _places(self) -> Counter:
        """How many seats there are at every (node, gpus)."""
        return Counter((seat.node, seat.gpus) for seat in self._seats)

    def _free_gpus(self, host: HostRecord, hosts: list[HostRecord]) -> tuple[str, ...]:
        """GPUs of a seat on the host's node that no other host of the membership has."""
        taken = {other.gpus for other in hosts if other is not host and other.node == host.node and other.gpus}
        free = [gpus for node, gpus in self._places() if node == host.node and gpus not in taken]
        return free[0] if free else ()

    def _starting(self) -> list[HostRecord]:
        return [host for host in self._hosts.values() if host.info is None and not host.lost.is_set()]

    def _employ(self) -> None:
        """Start hosts where seats have too few, and spares where those of all seats are at work."""
        per_node = Counter(node for node, _ in self._places().elements())
        for node, number in per_node.items():
            if node in self._leaving | self._dead:
                continue
            alive = [host for host in self._hosts.values() if host.node == node and not host.lost.is_set()]
            if self._at_work and sum(host in self._members for host in alive) >= number:
                number += self._scaling.warm_spares
            for place in range(len(alive), number):
                self._start(node, spare=place >= per_node[node])

    def _start(self, node: str, spare: bool) -> None:
        self._started += 1
        name = f"{node[:6]}-{self._started}"
        host = HostRecord(name, node, start_host(name, node), None, time.monotonic(), spare=spare)
        self._hosts[name] = host
        self._begin(self._prepare(host))

    def _steps(self, host: HostRecord) -> bool:
        """Whether a member of the present membership has taken up the state."""
        status, others = host.status, ("idle", "joining", "engine", "closing")
        return status.get("membership") == self._number and status["phase"] not in others

    async def _prepare(self, host: HostRecord) -> None:
        host.info = await self._ask(host, host.handle.prepare.remote(self._config))
        if host.info is None and host.node not in self._leaving | self._dead:
            self._failures += 1
            if 0 <= self._scaling.max_failures < self._failures:
                await self._board.stop.remote(f"No process for the workers could be started: {host.reason}.")
        self._change.set()

    def _dismiss(self) -> None:
        """End the hosts that no seat holds any more and that are no spares, after their checkpoint is written."""
        seats = Counter(node for node, _ in self._places().elements())
        for node in {host.node for host in self._hosts.values()}:
            room = 0 if node in self._leaving or not seats[node] else seats[node] + self._scaling.warm_spares
            here = [host for host in self._hosts.values() if host.node == node and not host.lost.is_set()]
            here.sort(key=lambda host: host not in self._members)
            for host in here[room:]:
                if host not in self._members:
                    self._begin(self._end(host))

    async def _end(self, host: HostRecord) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(host.handle.flush.remote(), 120)
        self._lose(host, "")

    def _lose(self, host: HostRecord, reason: str) -> None:
        """Count a host as lost, and make it so."""
        if host.lost.is_set():
            return
        host.reason = reason
        host.lost.set()
        if host.used:
            self._board.post.remote("left", (host.name, time.monotonic()))
        with contextlib.suppress(Exception):
            ray.kill(host.handle)
        if reason and host.info is not None:  # a stopped process hears no request
            _kill_process(host.node, host.info.pid)
        if host not in self._members:
            self._hosts.pop(host.name, None)
        self._change.set()

    def _should_change(self, members: list[HostRecord]) -> bool:
        """Whether other hosts should train than those who do."""
        wanted = self._wanted()
        if len(wanted) < max(1, min(self._scaling.min_workers, len(self._seats))):
            return False
        return set(wanted) != set(members)

    # ---------------------------------------------------------------- watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            draining = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
            nodes = await asyncio.to_thread(ray.nodes)  # after: a node that dies meanwhile is in one of the two
            self._dead = {node["NodeID"] for node in nodes if not node["Alive"]}
            self._notice(set(draining))
            await asyncio.gather(
                *(self._look_at(host) for host in list(self._hosts.values()) if not host.lost.is_set())
            )

    def _notice(self, draining: set[str]) -> None:
        """Nodes that will go soon: their hosts leave at the next step, with nothing lost, and none is started there."""
        if ours := ({host.node for host in self._hosts.values()} & draining) - self._leaving:
            self._say(f"{len(ours)} of the run's nodes will go soon: its workers leave before.")
        if draining != self._leaving:
            self._leaving = draining
            self._change.set()

    async def _look_at(self, host: HostRecord) -> None:
        """Ask a host how it is; lose it if it has died, or has not answered or moved for too long."""
        if host.asking is None:
            host.asking = asyncio.ensure_future(self._ask(host, host.handle.status.remote()))
        done, _ = await asyncio.wait({host.asking}, timeout=WATCH_SECONDS)
        if done:
            status, host.asking = host.asking.result(), None
            if status is not None:
                host.status = status
        patience = self._scaling.hang_timeout_s
        if host.info is not None and host.silent() > patience:
            self._lose(host, f"no answer for {patience:g} seconds")
        stuck = host.status.get("seconds", 0.0)
        slow = max(patience, 20 * host.status.get("step_seconds", 0.0) or 10 * patience)
        ending = any(member.lost.is_set() for member in self._members)  # who waited for a lost one stops waiting
        if host.status.get("phase") == "step" and stuck > slow and not host.status["waiting"] and not ending:
            self._lose(host, f"no progress in a step for {stuck:.0f} seconds")

    async def _ask(self, host: HostRecord, reference) -> Any:
        """The answer to a call of a host; None if it is lost before."""
        answer = asyncio.ensure_future(_awaited(reference))
        lost = asyncio.create_task(host.lost.wait())
        await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if not answer.done():
            answer.cancel()
            return None
        try:
            result = answer.result()
            host.answered = time.monotonic()
            return result
        except ray.exceptions.RayActorError:
            self._lose(host, "its process died")
        except ray.exceptions.RayTaskError as error:
            cause = " ".join(str(error.cause).split())[:300]
            if type(error.cause).__name__ == "UserError":
                await self._board.stop.remote(cause)
            self._lose(host, f"{type(error.cause).__name__}: {cause}")
        except ray.exceptions.RayError as error:  # such as an actor that cannot start on a node that is gone
            self._lose(host, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None

    async def _outcome(self, host: HostRecord, reference) -> Outcome | None:
        return await self._ask(host, reference)

    async def _release(self, task: asyncio.Task, host: HostRecord) -> None:
        await asyncio.wait({task})
        host.busy = False
        self._change.set()

    async def _wait_for_change(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._change.wait(), seconds)
        self._change.clear()

    def _begin(self, work: Coroutine) -> None:
        """Do this beside the rest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, message: str) -> None:
        self._board.post.remote("message", message)


async def _awaited(reference) -> Any:
    return await reference


def _kill_process(node: str, pid: int) -> None:
    """SIGKILL a process of a node, also a stopped one, by a task there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def kill() -> None:
        import os
        import signal

        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    here = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote()


def actor_name(run: str) -> str:
    return f"coordinator of {run}"


def open_coordinator(name: str, config: HostConfig, scaling: "ScalingRecipe"):
    """Start the run's coordinator on this node; returns the actor's handle.

    Raises:
        ValueError: the cluster has one of that name: the run is under way.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(Coordinator)
        .options(
            num_cpus=0,
            name=actor_name(name),
            namespace=NAMESPACE,
            max_concurrency=1000,
            scheduling_strategy=here,
        )
        .remote(name, config, scaling)
    )
