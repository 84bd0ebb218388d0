"""Disturbances of a run under way."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from cluster.chaos.agent import Agent
from cluster.chaos.disturbances import Disturbance, Kind, Victim, choose, choose_node
from cluster.chaos.throttle import check_hold
from doge.common.errors import UserError
from doge.common.words import listed

PATIENCE = 10.0  # seconds that an event waits for a worker that trains
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 20.0  # an agent that says nothing for so long is lost


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
                where = listed(sorted(set(protected.values())))
                raise UserError(f"All workers are on the {where}, which must live on.")
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

    def act(self, event: Disturbance, pause_seconds: float, throttle_share: float, throttle_seconds: float) -> Done:
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

        from cluster.machines.nodes import node_of_actor

        head = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
        driver = node_of_actor(self._coordinator)
        here = ray.get_runtime_context().get_node_id()
        return {here: "node of this command", driver: "node of the run's driver"} | dict.fromkeys(head, "head node")

    def _done(self, kind: Kind, victims: list[Victim], node: str = "", how: str = "") -> Done:
        return Done(kind, _node_name(node or victims[0].node), tuple(victims), how)


def _connect(address: str | None) -> None:
    """Join a cluster that is there. Raises UserError."""
    from cluster.machines.connection import connect
    from cluster.machines.scaling import ScalingRecipe

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

    from cluster.elastic.coordinator import NAMESPACE, actor_name

    actors = ray.util.list_named_actors(all_namespaces=True)
    ours = (actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
    runs = sorted(actor.removeprefix(actor_name("")) for actor in ours if actor.startswith(actor_name("")))
    if name is None and len(runs) > 1:
        raise UserError(f"The runs {listed(runs)} are under way in the cluster: choose one with --run.")
    if not runs or name not in (None, *runs):
        there = f"; there is {listed(runs)}" if runs else ""
        raise UserError(f"No run{f' {name}' if name else ''} is under way in the cluster{there}: start it first.")
    with suppress(ValueError):
        return name or runs[0], ray.get_actor(actor_name(name or runs[0]), namespace=NAMESPACE)
    raise RunOver(f"The run {name or runs[0]} is over.")


def _node_name(node: str) -> str:
    import ray

    from cluster.elastic.membership import node_name

    machines = {row["NodeID"]: row["NodeManagerHostname"] for row in ray.nodes()}
    return node_name(machines.get(node, "unknown"), node)
