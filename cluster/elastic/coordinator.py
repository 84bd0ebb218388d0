"""The coordinator: an actor on the driver's node that keeps hosts in the seats and forms one membership after another.

It decides nothing itself: it hands what its hosts, seats, nodes and timers say to `decide`, one observation at a time,
and carries out the commands that come back.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import ray

from cluster.elastic.decisions.commands import (
    Abort,
    AskForAddress,
    AskForBeat,
    AskForOffer,
    AskToLeave,
    Command,
    Commit,
    Finish,
    Flush,
    KillHost,
    LookAtNodes,
    Post,
    RunMember,
    StartHost,
    StopRun,
)
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.known import WATCH_SECONDS, Known
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
    RunInterrupted,
    RunStopped,
    SeatTaken,
    Tick,
)
from cluster.elastic.events import Message
from cluster.elastic.host import kill_host, start_host
from cluster.elastic.membership import Offer, Outcome, Seat
from cluster.elastic.workload import Job
from cluster.machines.nodes import draining_and_dead_nodes
from cluster.machines.scaling import ScalingRecipe
from doge.common.errors import MachineError, UserError

NAMESPACE = "doge"
TELL_SECONDS = 30.0  # that Ray's own calls may fail before anybody is told


class Coordinator:
    """The actor's class; `open_coordinator` starts one.

    Args:
        name: of the run.
        job: a list of one reference to the hosts' `Job`, which is not opened here: to import what its settings are
            made of takes longer than everything else that starts this process.
        board: actor handle of the driver's `Board`.
        scaling: how many hosts there may be, and how patient to be.
    """

    def __init__(self, name: str, job: list[Any], board: Any, scaling: ScalingRecipe):
        self.name = name
        (self._job,), self._board = job, board
        self._known = Known(scaling)
        self._observed: asyncio.Queue[Observation] = asyncio.Queue()
        self._handles: dict[str, Any] = {}  # of the hosts that live, by name
        self._offered: Any = None  # reference to the state that was offered last
        self._group = asyncio.TaskGroup()
        self._errands: set[asyncio.Task[None]] = set()  # what goes on beside the decisions
        self._over = asyncio.Event()

    async def sit(self, seat: Seat) -> None:
        """A worker of Ray Train is there."""
        self._observed.put_nowait(SeatTaken(seat))

    async def interrupt(self) -> None:
        """Let the members commit their state and leave, and return when the run is over."""
        self._observed.put_nowait(RunInterrupted())
        await self._over.wait()

    async def over(self, timeout_s: float) -> bool:
        """Whether the run is over, as soon as it is, or after ``timeout_s`` seconds.

        The time is bounded since a caller may die meanwhile: its call would be one of those that are answered at once
        for ever.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), timeout_s)
        return self._over.is_set()

    async def members(self) -> list[dict[str, Any]]:
        """The hosts that are ready, for whoever wants to see them or, as `cluster.chaos`, to disturb them."""
        ranks = {host: rank for rank, host in enumerate(self._known.members)}
        return [
            {
                "host": host.name,
                "node": host.node,
                "pid": host.info.pid,
                "rank": ranks.get(host),
                "membership": self._known.number,
                "step": host.beat.step,
                "activity": host.beat.activity,
                "leaving": host.node in self._known.leaving,
            }
            for host in self._known.alive()
            if host.info is not None
        ]

    async def conduct(self) -> None:
        """Form memberships until the run is finished or stopped; the board knows why."""
        try:
            async with self._group:
                self._begin(self._watch())
                while not self._over.is_set():
                    observation = await self._observed.get()
                    for command in decide(self._known, observation, time.monotonic()):
                        await self._carry_out(command)
                for errand in self._errands:
                    errand.cancel()
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            with contextlib.suppress(ray.exceptions.RayError):  # it may be the board that is lost
                await self._board.stop.remote(f"The coordinator of the run failed: {error!r}.")
            raise error from None
        finally:
            for handle in self._handles.values():
                kill_host(handle)
            self._over.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(ray.exceptions.ActorUnavailableError):  # it is asked again
                if await self._board.stopped.remote() is not None:
                    self._observed.put_nowait(RunStopped())
            self._observed.put_nowait(Tick())
            await asyncio.sleep(WATCH_SECONDS)

    async def _carry_out(self, command: Command) -> None:
        match command:
            case StartHost(host, node, aside):
                self._handles[host] = start_host(host, node)
                self._begin(self._ask(host, self._handles[host].prepare.remote(self._job, aside), HostPrepared))
            case KillHost(host, node, process):
                kill_host(self._handles.pop(host), node, process)
            case AskForBeat(host):
                self._begin(self._ask(host, self._handles[host].status.remote(), BeatHeard))
            case AskForOffer(host, copy):
                self._begin(self._ask(host, self._handles[host].offer.remote(copy), self._keep_offer))
            case AskForAddress(host):
                self._begin(self._ask(host, self._handles[host].address.remote(), AddressGiven))
            case RunMember(host, membership, rank, given):
                outcome = self._handles[host].run.remote(membership, rank, self._offered if given else None)
                self._begin(self._ask(host, outcome, MemberEnded))
            case AskToLeave(host, number):
                self._handles[host].leave.remote(number)
            case Abort(host, number):
                self._handles[host].abort.remote(number)
            case Commit(host):
                self._handles[host].commit.remote()
            case Flush(host):
                self._begin(self._flush(host, self._handles[host].flush.remote()))
            case LookAtNodes(asked):
                self._begin(self._look_at_nodes(asked))
            case Post(event):
                self._board.post.remote(event)
            case StopRun(reason):
                await self._board.stop.remote(reason)
            case Finish():
                self._over.set()

    async def _ask(self, host: str, answer: Any, learn: Callable[[str, Any], Observation]) -> None:
        """Turn a host's answer, or the error that comes instead, into an observation."""
        try:
            observation = learn(host, await answer)
        except ray.exceptions.ObjectLostError as error:  # the state on its way, with the host that offered it
            reason = f"the state was lost on its way ({type(error).__name__})"
            observation = MemberEnded(host, Outcome("broken", 0, reason))
        except ray.exceptions.RayError as error:
            observation = host_failure(host, error)
        self._observed.put_nowait(observation)

    def _keep_offer(self, host: str, offer: Offer) -> Offered:
        self._offered = offer.references[0] if offer.references else None
        return Offered(host, offer.state, offer.trouble, copied=bool(offer.references))

    async def _flush(self, host: str, flushed: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await flushed
        self._observed.put_nowait(Flushed(host))

    def _begin(self, errand: Coroutine[Any, Any, None]) -> None:
        """Do this beside the decisions; an error in it ends the run."""
        task = self._group.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _look_at_nodes(self, asked: float) -> None:
        failing_since, told = None, False
        while True:
            try:
                draining, dead = await asyncio.to_thread(draining_and_dead_nodes)
                break
            except Exception as error:  # Ray's head is slow, or starts anew: each kind of call has errors of its own
                failing_since = failing_since or time.monotonic()
                if not told and time.monotonic() - failing_since > TELL_SECONDS:
                    told = True
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    self._board.post.remote(Message(f"Ray does not say which nodes there are ({reason}): asking on."))
                await asyncio.sleep(WATCH_SECONDS)
        self._observed.put_nowait(NodesSeen(asked, frozenset(draining), frozenset(dead)))


def host_failure(host: str, error: ray.exceptions.RayError) -> HostFailed:
    """What a failed call says of its host, such as that it cannot start on a node that is gone."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, ray.exceptions.RaySystemError) and isinstance(cause.client_exc, Exception):
        cause = cause.client_exc  # from unpickling what the host was sent
    return HostFailed(
        host,
        error=type(cause).__name__,
        sentence=" ".join(str(cause).split())[:300],
        died=isinstance(error, ray.exceptions.RayActorError),
        user_error=isinstance(cause, UserError) and not isinstance(cause, MachineError),
    )


def actor_name(run: str) -> str:
    return f"coordinator of {run}"


def open_coordinator(name: str, job: Job, scaling: ScalingRecipe) -> Any:
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
        .remote(name, [ray.put(job)], job.board, scaling)
    )
