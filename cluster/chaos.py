"""Chaos: kill, pause and throttle the workers of a run under way, to see that the training does not notice.

    python -m cluster.chaos --every 30 --duration 600
    python -m cluster.chaos --run tiny --seed 7 --kinds kill-worker kill-worker pause
    python -m cluster.chaos --at 30 kill-worker 60 kill-node 90 throttle
    python -m cluster.chaos --every 30 --seed 7 --dry-run

It finds the only run of the cluster by itself. Each event is a line: the seconds since the start, what, and whom. The
times between events are exponentially distributed; the same seed gives the same events. A kind that is named twice
comes twice as often. Whatever ends this command, no worker stays stopped. From Python:

    from cluster.chaos import Chaos

    with Chaos() as chaos:
        chaos.kill_worker(rank=0)
        chaos.throttle(rank=1, share=1 / 3, seconds=20)
"""

import itertools
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from random import Random
from typing import Annotated, Any, Literal, get_args

import psutil
import tyro

from cluster.throttle import Throttle, check_hold
from doge.errors import UserError

Kind = Literal["kill-worker", "kill-rank-0", "kill-node", "pause", "throttle"]
PATIENCE = 10.0  # seconds that an event waits for a worker that trains
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 20.0  # an agent that says nothing for so long is lost

# ---------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Event:
    """What is to happen.

    Args:
        number: from 1.
        at: seconds since the start.
        kind: of disturbance.
    """

    number: int
    at: float
    kind: Kind

    def __str__(self) -> str:
        return f"{self.at:8.1f} s  {self.kind}"


@dataclass(frozen=True)
class Victim:
    """A worker as its run's coordinator describes it.

    Args:
        host: its name.
        node: Ray's id of its node.
        pid: of its process there.
        rank: in the membership that trains; None for a spare.
        step: that it is at.
    """

    host: str
    node: str
    pid: int
    rank: int | None
    step: int


def schedule(seed: int, every: float, kinds: tuple[Kind, ...], duration: float = math.inf) -> Iterator[Event]:
    """The events that come before ``duration`` seconds: a pure function of its arguments.

    The times between them are exponentially distributed with the mean ``every`` (a Poisson process), the kinds uniform
    over ``kinds``. A longer duration only adds events.
    """
    chance, at = Random(seed), 0.0
    for number in itertools.count(1):
        at += chance.expovariate(1 / every)
        if at >= duration:
            return
        yield Event(number, at, chance.choice(kinds))


def choose(
    members: Iterable[Victim], seed: int, number: int, rank: int | None = None, spares: bool = False
) -> Victim | None:
    """Whom event ``number`` meets, or the one of ``rank``; None if nobody can be.

    A pure function, also of the order of ``members``. With ``spares``, hosts that only wait are met too.
    """
    candidates = [member for member in members if spares or member.rank is not None]
    if rank is not None:
        return next((member for member in candidates if member.rank == rank), None)
    candidates.sort(key=lambda member: (math.inf if member.rank is None else member.rank, member.host))
    return Random(f"{seed}/{number}").choice(candidates) if candidates else None


def choose_node(members: Iterable[Victim], protected: Iterable[str], seed: int, number: int) -> str | None:
    """The node that event ``number`` meets: one with a worker and not protected. None if there is none."""
    candidates = sorted({member.node for member in members if member.rank is not None} - set(protected))
    return Random(f"{seed}/{number}").choice(candidates) if candidates else None


# ---------------------------------------------------------------- the nodes


class Agent:
    """The actor's class: sends the signals on one node. It dies with its owner, and then nothing stays stopped."""

    def __init__(self):
        self._holds: dict[int, Throttle] = {}

    def kill(self, pid: int) -> bool:
        """SIGKILL a worker; False if it is gone."""
        if worker := self._worker(pid):
            worker.kill()
        return worker is not None

    def hold(self, pid: int, share: float, seconds: float) -> bool:
        """Give a worker ``share`` of its time for ``seconds``, in place of an earlier hold; False if it is gone."""
        if pid in self._holds:
            self._holds.pop(pid).end()
        if self._worker(pid) is None:
            return False
        with suppress(ProcessLookupError):
            self._holds[pid] = Throttle(pid, share, seconds)
        return pid in self._holds

    def release(self) -> None:
        """Let all workers run freely."""
        while self._holds:
            self._holds.popitem()[1].end()

    def has_raylet(self) -> bool:
        """Whether there is a raylet to kill."""
        return self._raylet() is not None

    def kill_node(self) -> None:
        """SIGKILL the raylet and all its processes, as if the machine lost its power; this one too: no answer comes."""
        raylet, here = self._raylet(), os.getpid()
        children = [child for child in raylet.children(recursive=True) if child.pid != here]
        for process in [raylet, *children]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(here, signal.SIGKILL)

    def _raylet(self) -> psutil.Process | None:
        return next((parent for parent in psutil.Process().parents() if parent.name() == "raylet"), None)

    def _worker(self, pid: int) -> psutil.Process | None:
        """The process, if it still is a host."""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if any("ray::Host" in part for part in process.cmdline()):
                return process
        return None


# ---------------------------------------------------------------- a run


class RunOver(UserError):
    """The run has ended."""


class Nobody(UserError):
    """There is no such worker now; there may be one soon."""


@dataclass(frozen=True)
class Done:
    """What was done.

    Args:
        kind: of disturbance.
        node: what a reader calls it.
        victims: the workers that it met; all those of the node for ``kill-node``.
        how: which share of its time, and for how long.
    """

    kind: Kind
    node: str
    victims: tuple[Victim, ...]
    how: str = ""

    def __str__(self) -> str:
        whom = [
            f"host {victim.host} ({'spare' if victim.rank is None else f'rank {victim.rank}'}, pid {victim.pid})"
            for victim in self.victims
        ]
        step = max((victim.step for victim in self.victims), default=0)
        return "  ".join(
            filter(None, (f"{self.kind:<11}", f"node {self.node}", ", ".join(whom), f"at step {step:,}", self.how))
        )


class Chaos:
    """Disturbs one run; a context manager, after which nothing stays stopped.

    Args:
        run: its name; by default the only one under way in the cluster.
        address: of the Ray cluster; by default that of this process, job or machine.
        seed: chooses the victims that the caller does not name.
        spares: hosts that only wait are chosen too.

    Raises:
        UserError: no cluster answers, it has no such run, or none or several to choose from. The methods raise `Nobody`
            if no worker fits, and `RunOver` once the run has ended.
    """

    def __init__(self, run: str | None = None, address: str | None = None, seed: int = 0, spares: bool = False):
        _connect(address)
        self.run, self._coordinator = _find_run(run)
        self.seed, self.spares = seed, spares
        self._number = 0  # of the latest event
        self._agents: dict[str, Any] = {}
        self._killed: set[str] = set()  # nodes
        self._held_until = 0.0  # monotonic
        self.members()

    def __enter__(self) -> "Chaos":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def members(self) -> list[Victim]:
        """The hosts of the run, spares included, on nodes that were not killed here. Raises RunOver."""
        import ray

        while True:
            try:
                rows = ray.get(self._coordinator.members.remote())
                break
            except ray.exceptions.ActorUnavailableError:  # it is dying, or the network falters
                time.sleep(LOOK_SECONDS)
            except ray.exceptions.RayActorError as error:
                raise RunOver(f"The run {self.run} is over.") from error
        names = [field.name for field in fields(Victim)]
        members = [Victim(**{name: row[name] for name in names}) for row in rows if row["node"] not in self._killed]
        for node in {member.node for member in members}:
            self._agent(node)  # its process takes a second to start
        return members

    def kill_worker(self, rank: int | None = None) -> Done:
        """SIGKILL a worker."""
        victim = self._victim(rank)
        self._order(victim.node, "kill", victim.pid)
        return self._done("kill-worker" if rank != 0 else "kill-rank-0", [victim])

    def pause(self, rank: int | None = None, seconds: float = 5.0) -> Done:
        """Stop a worker, and continue it after ``seconds``; returns once it is stopped."""
        return self._hold("pause", rank, 0.0, seconds)

    def throttle(self, rank: int | None = None, share: float = 1 / 3, seconds: float = 20.0) -> Done:
        """Give a worker ``share`` of its time for ``seconds``, from now on; returns at once."""
        return self._hold("throttle", rank, share, seconds)

    def kill_node(self, node: str | None = None) -> Done:
        """SIGKILL a node's raylet and all its processes, as if the machine lost its power.

        Args:
            node: Ray's id of it.

        Raises:
            UserError: it is the head, the run's driver is there, or this process; or all nodes with workers are such.
        """
        import ray

        members, protected = self.members(), self._protected()
        self._number += 1
        if node is None:
            if not any(member.rank is not None for member in members):
                raise Nobody(f"No worker of {self.run} is training.")
            node = choose_node(members, protected, self.seed, self._number)
            if node is None:
                raise UserError(f"All workers are on the {_list(sorted(set(protected.values())))}, which must live on.")
        elif node in protected:
            raise UserError(f"Node {_node_name(node)} is the {protected[node]}, which must live on: choose another.")
        victims = [member for member in members if member.node == node]
        self._order(node, "has_raylet")
        self._killed.add(node)
        ray.wait([self._agents.pop(node).kill_node.remote()], timeout=ANSWER_SECONDS)  # its death is the answer
        return self._done("kill-node", victims, node)

    def release(self) -> None:
        """Let all workers run freely now."""
        import ray

        if answers := [agent.release.remote() for agent in self._agents.values()]:
            ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS)
        self._held_until = 0.0

    def close(self) -> None:
        """Let all workers run freely, and end the agents."""
        import ray

        try:
            self.release()
        finally:
            for agent in self._agents.values():
                ray.kill(agent)
            self._agents.clear()

    def act(self, event: Event, pause_seconds: float, throttle_share: float, throttle_seconds: float) -> Done:
        """Do what ``event`` says, whatever its time; waits some seconds for a worker that trains."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._number = event.number - 1
            try:
                match event.kind:
                    case "kill-worker":
                        return self.kill_worker()
                    case "kill-rank-0":
                        return self.kill_worker(rank=0)
                    case "kill-node":
                        return self.kill_node()
                    case "pause":
                        return self.pause(seconds=pause_seconds)
                    case "throttle":
                        return self.throttle(share=throttle_share, seconds=throttle_seconds)
            except Nobody:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_SECONDS)

    def sleep(self, until: float) -> None:
        """Sleep until ``time.monotonic()`` is ``until``. Raises RunOver if the run ends before."""
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(LOOK_SECONDS, left))
            self.members()

    def sleep_while_held(self) -> None:
        """Sleep until no worker is paused or throttled any more. Raises RunOver if the run ends before."""
        self.sleep(self._held_until)

    def _victim(self, rank: int | None) -> Victim:
        self._number += 1
        victim = choose(self.members(), self.seed, self._number, rank, self.spares)
        if victim is None:
            raise Nobody(f"No worker of {self.run} is training{'' if rank is None else f' as rank {rank}'}.")
        return victim

    def _hold(self, kind: Kind, rank: int | None, share: float, seconds: float) -> Done:
        check_hold(share, seconds)
        victim = self._victim(rank)
        self._order(victim.node, "hold", victim.pid, share, seconds)
        self._held_until = max(self._held_until, time.monotonic() + seconds)
        return self._done(kind, [victim], how=(f"{share:.0%} of its time " if share else "") + f"for {seconds:g} s")

    def _order(self, node: str, order: str, *values: float) -> None:
        """Have the agent of a node carry an order out. Raises Nobody if it finds nothing to meet."""
        import ray

        try:
            answer = ray.get(getattr(self._agent(node), order).remote(*values), timeout=ANSWER_SECONDS)
        except (
            ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError, ray.exceptions.GetTimeoutError
        ) as error:  # fmt: skip
            self._agents.pop(node)
            raise Nobody(f"Node {_node_name(node)} does not answer.") from error
        if not answer:
            raise Nobody(f"The worker on node {_node_name(node)} is gone.")

    def _agent(self, node: str) -> Any:
        """The agent on a node, whose answers come once its process has started."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node not in self._agents:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self._agents[node] = ray.remote(num_cpus=0)(Agent).options(scheduling_strategy=there).remote()
        return self._agents[node]

    def _protected(self) -> dict[str, str]:
        """Nodes that must not be killed, and why."""
        import ray

        head = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
        driver = ray._private.state.state.actor_table(self._coordinator._actor_id.hex())["Address"]["NodeID"]
        here = ray.get_runtime_context().get_node_id()
        return {here: "node of this command", driver: "node of the run's driver"} | dict.fromkeys(head, "head node")

    def _done(self, kind: Kind, victims: list[Victim], node: str = "", how: str = "") -> Done:
        return Done(kind, _node_name(node or victims[0].node), tuple(victims), how)


def _connect(address: str | None) -> None:
    """Join a cluster that is there. Raises UserError."""
    from cluster.connection import connect
    from cluster.recipe import ScalingRecipe

    address = address or os.environ.get("RAY_ADDRESS")
    try:
        connect(ScalingRecipe(address=address or "auto"))
    except UserError:
        if address:
            raise
        raise UserError(
            "This machine belongs to no Ray cluster: start a training first, or give the --address of its cluster."
        ) from None


def _find_run(name: str | None) -> tuple[str, Any]:
    """The name and the coordinator of a run under way. Raises UserError."""
    import ray

    from cluster.coordinator import NAMESPACE, actor_name

    actors = ray.util.list_named_actors(all_namespaces=True)
    ours = (actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
    runs = sorted(actor.removeprefix(actor_name("")) for actor in ours if actor.startswith(actor_name("")))
    if name is None and len(runs) > 1:
        raise UserError(f"The runs {_list(runs)} are under way in the cluster: choose one with --run.")
    if not runs or name not in (None, *runs):
        there = f"; there is {_list(runs)}" if runs else ""
        raise UserError(f"No run{f' {name}' if name else ''} is under way in the cluster{there}: start it first.")
    with suppress(ValueError):
        return name or runs[0], ray.get_actor(actor_name(name or runs[0]), namespace=NAMESPACE)
    raise RunOver(f"The run {name or runs[0]} is over.")


def _node_name(node: str) -> str:
    import ray

    from cluster.membership import node_name

    machines = {row["NodeID"]: row["NodeManagerHostname"] for row in ray.nodes()}
    return node_name(machines.get(node, "unknown"), node)


def _list(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings:
    """Options of `python -m cluster.chaos`.

    Args:
        run: name of the run; by default the only one under way in the cluster.
        address: of the Ray cluster; by default that of this machine.
        seed: of the events and their victims; by default a new one, which is printed.
        every: seconds from one event to the next, in the mean of an exponential distribution.
        duration: seconds in which events begin; by default until the run ends.
        kinds: what may happen; one that is named twice comes twice as often.
        at: these events instead, each as its seconds since the start and its kind.
        pause_seconds: that a paused worker is stopped.
        throttle_share: of its time that a throttled worker gets.
        throttle_seconds: that a worker is throttled.
        spares: choose hosts that only wait, too.
        dry_run: print the events and do nothing.
    """

    run: str | None = None
    address: str | None = None
    seed: int | None = None
    every: float = 60.0
    duration: float | None = None
    kinds: tuple[Kind, ...] = get_args(Kind)
    at: tuple[tuple[float, Kind], ...] = ()
    pause_seconds: float = 5.0
    throttle_share: float = 1 / 3
    throttle_seconds: float = 20.0
    spares: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self):
        for name in ("every", "duration", "pause_seconds", "throttle_seconds", "throttle_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
        check_hold(self.throttle_share, self.throttle_seconds)
        if not self.kinds:
            raise UserError(f"--kinds needs at least one of {_list(list(get_args(Kind)))}.")
        if any(not 0 <= at < math.inf for at, _ in self.at):
            raise UserError("--at takes seconds since the start, which are not negative.")

    def events(self, seed: int) -> Iterator[Event]:
        duration = self.duration or math.inf
        if self.at:
            return (Event(number, *event) for number, event in enumerate(sorted(self.at), 1) if event[0] < duration)
        return schedule(seed, self.every, self.kinds, duration)


def disturb(settings: Settings, say: Callable[[Any], None] = print) -> None:
    """Do what the settings say, a line of ``say`` for each event. Raises UserError."""
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    say(f"Seed {seed}")
    events = settings.events(seed)
    if settings.dry_run:
        for event in itertools.islice(events, 30):
            say(event)
        if next(events, None):
            say("     … and so on")
        return
    with Chaos(settings.run, settings.address, seed, settings.spares) as chaos:
        say(f"Disturbing the run {chaos.run}")
        start = time.monotonic()
        try:
            for event in events:
                chaos.sleep(start + event.at)
                try:
                    done = chaos.act(event, settings.pause_seconds, settings.throttle_share, settings.throttle_seconds)
                except RunOver:
                    raise
                except UserError as reason:
                    done = f"{event.kind:<11}  skipped: {reason}"
                say(f"{time.monotonic() - start:8.1f} s  {done}")
            chaos.sleep_while_held()
        except RunOver as over:
            say(over)


def main() -> None:
    """The command: 0 done or the run is over, 1 a sentence on standard error, 130 interrupted."""
    from doge.recipe import parse

    try:
        settings = parse(Settings, Settings(), sys.argv[1:], __doc__, "python -m cluster.chaos")
        disturb(settings, lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted: all workers run freely.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
