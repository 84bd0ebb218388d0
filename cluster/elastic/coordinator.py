"""The coordinator: an actor on the driver's node that keeps hosts in the seats and forms one membership after another.

A host that is lost ends its membership for all; the survivors and a warm spare form the next one within a second or two
and go on from the newest state that one of them holds, or from the last checkpoint. A host that comes, or one whose
node is about to go, ends it at a step that all agree on, so that nothing is repeated.
"""

import asyncio
import time
from collections import Counter
from typing import Any

import ray

from cluster.elastic.events import HostJoined, MembershipFormed
from cluster.elastic.host_pool import WATCH_SECONDS, HostPool, HostRecord
from cluster.elastic.membership import Member, Membership, Outcome, Seat, node_name
from cluster.elastic.workload import Job
from cluster.machines.scaling import ScalingRecipe

NAMESPACE = "doge"
ABORT_SECONDS = 1.0  # from a loss until those who have not noticed it are told
PAUSE_SECONDS = 30.0  # the longest one between attempts to form a membership


class Coordinator:
    """The actor's class; `open_coordinator` starts one.

    Args:
        name: of the run.
        job: for the hosts.
        scaling: how many there may be, and how patient to be.
    """

    def __init__(self, name: str, job: Job, scaling: ScalingRecipe):
        self.name = name
        self._scaling, self._board = scaling, job.board
        self._pool = HostPool(job, scaling)
        self._groups: dict[str, dict[int, Seat]] = {}
        self._over = asyncio.Event()
        self._number = 0
        self._reached = 0  # steps that were made, in whatever membership
        self._at_work = False  # the present membership has taken up the state and steps
        self._failures = 0  # in a row, without a new step
        self._holder: HostRecord | None = None  # of the newest state
        self._lost_at: float | None = None

    # ---------------------------------------------------------------- seats

    async def sit(self, seat: Seat) -> None:
        """A worker of Ray Train is there; once its whole group is, the group's seats are those that count."""
        group = self._groups.setdefault(seat.group, {})
        group[seat.rank] = seat
        if len(group) == seat.size:
            self._groups = {seat.group: group}
            self._pool.seat(tuple(group[rank] for rank in range(seat.size)))

    async def over(self) -> None:
        """Return when the run is over."""
        await self._over.wait()

    # ---------------------------------------------------------------- looking in

    async def members(self) -> list[dict[str, Any]]:
        """The hosts, for whoever wants to see them or, as `cluster.chaos`, to disturb them."""
        ranks = {host: rank for rank, host in enumerate(self._pool.members)}
        return [
            {
                "host": host.name,
                "node": host.node,
                "pid": host.info.pid,
                "rank": ranks.get(host),
                "membership": self._number,
                "step": host.status.step,
                "activity": host.status.activity,
                "leaving": host.node in self._pool.leaving,
            }
            for host in self._pool.hosts.values()
            if host.ready
        ]

    # ---------------------------------------------------------------- the run

    async def conduct(self) -> None:
        """Form memberships until the run is finished or stopped; the board knows why."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._pool.watch())
                while await self._board.stopped.remote() is None:
                    hosts = await self._gather()
                    if not hosts or await self._serve(hosts):
                        break
                watch.cancel()
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            await self._board.stop.remote(f"The coordinator of the run failed: {error!r}.")
            raise error from None
        finally:
            self._pool.close()
            self._over.set()

    async def _gather(self) -> list[HostRecord]:
        """Wait for enough ready hosts: at the start all of the first seats', later the smallest number allowed."""
        while True:
            if await self._board.stopped.remote() is not None:
                return []
            self._pool.employ(spares=False)
            if reason := self._pool.hopeless(self._enough()):
                await self._board.stop.remote(f"No process for the workers could be started: {reason}.")
                return []
            hosts, starting = self._pool.wanted(), self._pool.starting()
            # Whoever answers late only because its process was just born is worth the wait where nobody else is there.
            if self._pool.seats and len(hosts) >= self._enough() and (self._number > 0 or not starting):
                hosts = await self._pool.answering(hosts)
                if len(hosts) >= self._enough():
                    return hosts
            await self._pool.wait_for_change(WATCH_SECONDS)

    async def _serve(self, hosts: list[HostRecord]) -> bool:
        """One membership, from forming to its end; True if the run is over."""
        began = time.monotonic()
        formed = await self._form(hosts)
        if isinstance(formed, str):
            self._pool.say(f"The workers could not meet: {formed}")
            over = await self._note_failure(formed)
            await asyncio.sleep(0 if over else min(WATCH_SECONDS * 2 ** min(self._failures, 9), PAUSE_SECONDS))
            return over
        membership, hosts, given, step = formed
        lost_for, self._lost_at = began - self._lost_at if self._lost_at is not None else None, None
        self._pool.members, first = hosts, step
        calls = {}
        for rank, host in enumerate(hosts):
            host.busy = True
            if not host.used:
                host.used = True
                at = time.monotonic() if host.spare else host.started
                self._board.post.remote(HostJoined(host.name, node_name(host.info.machine, host.node), at))
            answer = host.handle.run.remote(membership, rank, None if host.name == membership.source else given)
            calls[asyncio.create_task(self._pool.ask(host, answer))] = host
        formed_s = time.monotonic() - began
        await self._board.post.remote(
            MembershipFormed(membership.number, began, len(hosts), step, self._reached, formed_s, lost_for)
        )
        outcomes = await self._until_ended(calls)
        self._pool.members = []
        return await self._judge(outcomes, first)

    async def _form(self, hosts: list[HostRecord]) -> tuple[Membership, list[HostRecord], Any, int] | str:
        """Let the host with the newest state offer it, and order the hosts behind it; or why that could not be."""
        source = self._source(hosts)
        if source in hosts:
            hosts = [source, *(host for host in hosts if host is not source)]
        source.busy = True
        offered = await self._pool.ask(source, source.handle.offer.remote(hosts != [source]))
        source.busy = False
        address = await self._pool.ask(hosts[0], hosts[0].handle.address.remote())
        if lost := [host for host in {source, *hosts} if not host.alive]:
            return f"a worker was lost ({lost[0].reason})."
        if offered.trouble:
            return offered.trouble
        self._number += 1
        members = []
        for host in hosts:
            host.gpus = host.gpus if host.gpus is not None else self._pool.free_gpus(host, hosts)
            members.append(Member(host.name, host.node, host.info.machine, host.gpus))
        self._reached = max(self._reached, offered.step)
        self._holder = hosts[0]
        membership = Membership(self._number, tuple(members), tuple(address), source.name)
        return membership, hosts, offered.references[0] if offered.references else None, offered.step

    def _source(self, hosts: list[HostRecord]) -> HostRecord:
        """The host to take the state from: the last rank 0, also one that is about to go, or whoever has the newest."""
        idle = [host for host in self._pool.hosts.values() if host.ready and not host.busy and host.answers()]
        if self._holder in idle:
            return self._holder
        return max(idle or hosts, key=lambda host: (host.status.held, host in hosts))

    async def _until_ended(self, calls: dict[asyncio.Task, HostRecord]) -> dict[HostRecord, Outcome]:
        """Watch a membership's hosts until each has ended it or is lost."""
        outcomes: dict[HostRecord, Outcome] = {}
        pending = set(calls)
        asked_to_leave, ended_at, woken, self._at_work = False, None, False, False
        while pending:
            change = asyncio.create_task(self._pool.wait_for_change(WATCH_SECONDS))
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
                silent = remaining and not any(host.answers() for host in remaining)
                if (since > ABORT_SECONDS or silent) and not woken:
                    woken = True
                    for host in remaining:
                        host.handle.abort.remote(self._number)
                if silent:  # they find their membership gone when they come back
                    break
                for host in remaining:
                    if host.answers() and since > host.patience(self._scaling.hang_timeout_s):
                        self._pool.lose(host, "it could not be woken from waiting for a lost one")
                continue
            if not self._at_work and all(self._steps(host) for host in calls.values()):
                self._at_work = True
                self._pool.dismiss()  # the state has reached all: who had it may go
            self._pool.employ(spares=self._at_work)
            if not asked_to_leave and self._should_change(list(calls.values())):
                asked_to_leave = True
                for host in remaining:
                    host.handle.leave.remote()
        for task in pending:  # silent ones: whatever they say later frees them
            self._pool.free_when_done(calls[task], task)
        return outcomes

    async def _judge(self, outcomes: dict[HostRecord, Outcome], first: int) -> bool:
        """Draw the consequences of a membership's end; True if the run is over."""
        kinds = Counter(outcome.kind for outcome in outcomes.values())
        first_rank = outcomes.get(self._holder)  # it writes the last checkpoint, and has finished when that is there
        if first_rank is not None and first_rank.kind == "finished":
            return True
        if kinds["stopped"]:
            return True
        reached = max([outcome.step for outcome in outcomes.values()], default=first)
        progress, self._reached = reached > self._reached, max(self._reached, reached)
        lost = self._pool.lost()
        self._pool.forget_lost()
        if kinds["left"] == len(outcomes) and outcomes:
            return False
        reasons = [outcome.reason for outcome in outcomes.values() if outcome.kind == "full"]
        reasons += [f"a worker was lost ({host.reason})" for host in lost]
        reasons += [outcome.reason for outcome in outcomes.values() if outcome.kind == "broken"]
        reasons = reasons or ["a worker does not answer"]
        self._pool.say(f"Step {reached + 1:,} was interrupted: {reasons[0]}.")
        self._failures = -1 if progress else self._failures
        return await self._note_failure(reasons[0])

    async def _note_failure(self, reason: str) -> bool:
        """Count a failure without a new step; True if it was one too many, and the run is over."""
        self._failures += 1
        over = 0 <= self._scaling.max_failures < self._failures
        if over:
            await self._board.stop.remote(
                f"The workers failed {self._failures} times without making a new step ({reason.rstrip('.')}): the same "
                "command goes on from the last checkpoint."
            )
        return over

    def _should_change(self, members: list[HostRecord]) -> bool:
        """Whether other hosts should train than those who do."""
        wanted = self._pool.wanted()
        return len(wanted) >= self._enough() and set(wanted) != set(members)

    def _enough(self) -> int:
        """Hosts that a membership takes at least."""
        return max(1, min(self._scaling.min_workers, len(self._pool.seats)))

    def _steps(self, host: HostRecord) -> bool:
        """Whether a member of the present membership has taken up the state."""
        return host.status.membership == self._number and host.status.stage.at_work


def actor_name(run: str) -> str:
    return f"coordinator of {run}"


def open_coordinator(name: str, job: Job, scaling: ScalingRecipe):
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
        .remote(name, job, scaling)
    )
