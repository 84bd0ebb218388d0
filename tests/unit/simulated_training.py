"""Simulated hosts that train: they step together, commit to a storage, and meet what machines do."""

import random
from dataclasses import dataclass, field

from simulated_hosts import LATENCY, NOTICE_SECONDS, SimulatedHost, Simulation

from cluster.elastic.decisions import commands
from cluster.elastic.decisions.commands import Command
from cluster.elastic.decisions.observations import Offered
from cluster.elastic.membership import Membership, Outcome, StateId
from cluster.elastic.workload import Stage

NODE_IS_DEAD_SECONDS = 14.0  # by Ray's defaults


@dataclass(eq=False)
class Group:
    """Members of one membership, as they meet.

    Args:
        here: those that have joined, by rank.
        step: steps that all of them have made.
        broken: somebody noticed that one is lost.
    """

    membership: Membership
    here: dict[int, SimulatedHost] = field(default_factory=dict)
    step: int = 0
    broken: bool = False
    leaving: bool = False
    trouble: Outcome | None = None  # how the member named ``culprit`` ends at the next step
    culprit: str = ""


class TrainingSimulation(Simulation):
    """A run of ``steps`` steps on nodes with one seat each.

    Args:
        save_steps: steps between two commits of rank 0.
        step_s: seconds of a step with a host in every seat; fewer take longer.
    """

    def __init__(self, nodes: str, steps: int = 60, save_steps: int = 10, step_s: float = 1.0, **scaling):
        self.steps, self.save_steps, self.step_s = steps, save_steps, step_s
        self.storage_s = 0.2  # that a commit takes
        self.committed: list[int] = []  # in the order in which they were published
        self.starts: list[tuple[int, int, int]] = []  # (from step, committed, held) of every membership
        self.woken: dict[str, float] = {}  # when a host that was stopped went on, by its name
        self.notices: list[tuple[int, int]] = []  # (newest step on a node that went after a notice, newest elsewhere)
        self.trouble_until = 0.0  # of the storage
        self.publisher = 0  # the latest membership that did
        self.made: dict[int, set[int]] = {}  # step → memberships that made it
        self.cut: set[str] = set()
        self.groups: dict[int, Group] = {}
        self.alphabet = iter("mnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
        self.seated = nodes
        super().__init__(nodes, num_workers=(1, 64), **scaling)

    # ---------------------------------------------------------------- what befalls them

    def stop_process(self, host: SimulatedHost, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        host.silent = True
        self.later(seconds, lambda: self._wake(host))

    def lose_node(self, node: str) -> None:
        """Its power fails: nothing closes; Ray finds it dead in its own time. Another node comes later."""
        hosts = [host for host in self.hosts.values() if host.node == node and not host.dead]
        for host in hosts:
            host.silent = host.gone = True

        def dead() -> None:
            self.dead.add(node)
            for host in hosts:
                host.silent = False
                self.kill(host)
            self._reseat(node, None)

        self.later(NODE_IS_DEAD_SECONDS, dead)
        self.later(NODE_IS_DEAD_SECONDS + 20, lambda: self._reseat(None, next(self.alphabet)))

    def cut_link(self, node: str, seconds: float) -> None:
        """Nothing comes through for a while; for longer than Ray waits, the node is dead and comes back as another."""
        if seconds > NODE_IS_DEAD_SECONDS:
            self.lose_node(node)
            return
        for host in self.hosts.values():
            if host.node == node and not host.dead:
                self.stop_process(host, seconds)

    def drain(self, node: str) -> None:
        """A notice; the node goes half a minute later, and another comes."""
        self.draining.add(node)
        self.later(2.0, lambda: self._reseat(node, next(self.alphabet)))

        def gone() -> None:
            self.dead.add(node)
            self._note_loss(node)
            for host in [host for host in self.hosts.values() if host.node == node and not host.dead]:
                self.kill(host)

        self.later(30.0, gone)

    def trouble(self, kind: str) -> None:
        """A member fails by itself at its next step."""
        group = self._stepping()
        if group is not None and group.here:
            host = group.here[max(group.here)]
            group.culprit, group.trouble = host.name, Outcome(kind, group.step, f"trouble of {host.node}")

    def hang(self, host: SimulatedHost) -> None:
        """It computes without an end."""
        host.moves = False

    def slow_storage(self, seconds: float, each: float) -> None:
        self.storage_s = each
        self.trouble_until = max(self.trouble_until, self.now + seconds + each)
        self.later(seconds, lambda: setattr(self, "storage_s", 0.2))

    def full_storage(self, seconds: float) -> None:
        """It neither takes nor gives anything for a while."""
        self.storage_trouble = "The disk is full."
        self.trouble_until = max(self.trouble_until, self.now + seconds)
        self.later(seconds, lambda: setattr(self, "storage_trouble", ""))

    # ---------------------------------------------------------------- how they train

    def _carry_out(self, command: Command) -> None:
        match command:
            case commands.RunMember(name, membership, rank, given):
                self.memberships[membership.number] = membership
                if rank == 0:
                    self._note_start(membership)
                self.later(LATENCY, lambda: self._join(self.hosts[name], membership, rank, given))
            case commands.AskForOffer(name):
                host = self.hosts[name]
                newest = StateId(self.committed[-1]) if self.committed else None
                if host.held is None or (newest is not None and newest.step > host.held.step):
                    host.held = newest
                self._answer(host, Offered(name, host.held, self.storage_trouble, copied=True))
            case commands.Commit(name):
                host = self.hosts[name]
                if host.held is not None and host.held.membership > 0:
                    self._commit(host, host.held.step, host.held.membership)
            case commands.AskToLeave(name):
                membership = self.hosts[name].membership
                if membership is not None:
                    self.groups[membership.number].leaving = True
            case _:
                super()._carry_out(command)

    def _note_loss(self, node: str) -> None:
        """Note the newest step that goes with a node, and the newest that is committed or held elsewhere.

        Who was stopped, or had lost its machine's storage a while ago, could not commit.
        """
        awake = [host for host in self.hosts.values() if not host.dead and not host.silent and host.moves and host.held]
        awake = [host for host in awake if self.now - self.woken.get(host.name, 0.0) > 20]
        own = max((host.held.step for host in awake if host.node == node), default=0)
        elsewhere = max((host.held.step for host in awake if host.node != node), default=0)
        if self.now - self.trouble_until > 20:
            self.notices.append((own, max([0, elsewhere, *self.committed])))

    def _note_start(self, membership: Membership) -> None:
        """Note what a membership starts from, and the newest that there was, but for hosts that hang or just woke."""
        awake = [host for host in self.hosts.values() if not host.dead and not host.silent and host.moves]
        held = [host.held.step for host in awake if host.held and self.now - self.woken.get(host.name, 0.0) > 5]
        start = membership.start.step if membership.start else 0
        self.starts.append((start, max([0, *self.committed]), max([0, *held])))

    def _join(self, host: SimulatedHost, membership: Membership, rank: int, given: bool) -> None:
        if host.dead:
            return
        if not given and membership.start != host.held and membership.start is not None:
            self.end_of(host, Outcome("broken", host.step, "another state than it had told"))
            return
        host.membership, host.waiting, host.stage = membership, True, Stage.JOINING
        host.step = membership.start.step if membership.start else 0
        group = self.groups.setdefault(membership.number, Group(membership, step=host.step))
        group.here[rank] = host
        if len(group.here) == len(membership.members):
            self.later(0.3, lambda: self._begin(group))

    def _begin(self, group: Group) -> None:
        if self._complete(group):
            for host in group.here.values():
                host.held = StateId(group.step, group.membership.number)
                host.stage, host.waiting = Stage.STEPPING, False
            self.later(self.step_seconds(group), lambda: self._make_step(group))

    def step_seconds(self, group: Group) -> float:
        return self.step_s * max(len(self.known.seats), 1) / len(group.here)

    def _complete(self, group: Group) -> bool:
        """Whether all members are in it and reachable; otherwise those that are wait."""
        members = list(group.here.values())
        if group.broken or any(host.membership is not group.membership for host in members):
            return False
        if not any(host.silent or not host.moves for host in members):
            return True
        for host in members:
            host.waiting = host.moves
        self.later(0.2, lambda: self._retry(group))
        return False

    def _retry(self, group: Group) -> None:
        """A member that was only stopped goes on where it was."""
        if self._complete(group):
            for host in group.here.values():
                host.waiting = False
            self._make_step(group)

    def _make_step(self, group: Group) -> None:
        if not self._complete(group):
            return
        hosts, number = list(group.here.values()), group.membership.number
        if group.trouble is not None:
            for host in hosts:
                own = host.name == group.culprit
                self.end(host, group.trouble if own else Outcome("broken", host.step, "Connection closed by peer"))
            return
        group.step += 1
        for host in hosts:
            host.step_s = self.step_seconds(group)
        self.made.setdefault(group.step, set()).add(number)
        for host in hosts:
            host.step, host.held = group.step, StateId(group.step, number)
        last = group.step == self.steps
        if last or group.leaving or group.step % self.save_steps == 0:
            self._commit(group.here[0], group.step, number)
        if last or group.leaving:
            for host in hosts:
                self.end(host, Outcome("finished" if last else "left", group.step))
            return
        self.later(self.step_seconds(group), lambda: self._make_step(group))

    def _commit(self, host: SimulatedHost, step: int, number: int) -> None:
        def publish() -> None:
            if host.dead or host.gone:
                return
            if self.storage_trouble or host.silent:
                self.later(1.0, publish)
                return
            self.publisher = max(self.publisher, number)
            if number == self.publisher and (not self.committed or step > self.committed[-1]):
                self.committed.append(step)

        self.later(self.storage_s, publish)

    def _stepping(self) -> Group | None:
        group = self.groups.get(max(self.memberships, default=0))
        return group if group is not None and not group.broken else None

    def _wake(self, host: SimulatedHost) -> None:
        if not host.dead and not host.gone:
            self.woken[host.name] = self.now
            self.wake(host)
            for number in host.aborted:  # it hears of that now
                self.later(LATENCY, lambda number=number: self._ends_broken(host, number))

    def _reseat(self, lost: str | None, new: str | None) -> None:
        self.seated = "".join(node for node in self.seated if node != lost) + (new or "")
        if self.seated and not self.finished:
            self.sit(self.seated)

    def end_of(self, host: SimulatedHost, outcome: Outcome) -> None:
        from cluster.elastic.decisions.observations import MemberEnded

        self._answer(host, MemberEnded(host.name, outcome))

    def end(self, host: SimulatedHost, outcome: Outcome) -> None:
        if host.membership is not None and outcome.kind not in ("finished", "left"):
            self.groups[host.membership.number].broken = True
            for other in self.groups[host.membership.number].here.values():
                if other is not host and other.membership is host.membership and not other.silent:
                    number = host.membership.number
                    self.later(NOTICE_SECONDS, lambda other=other, number=number: self._ends_broken(other, number))
        host.moves, host.waiting = True, False
        super().end(host, outcome)

    def _ends_broken(self, host: SimulatedHost, number: int) -> None:
        if not host.silent and host.moves:
            super()._ends_broken(host, number)


MISFORTUNES = ("kill", "stop", "cut", "slow storage", "full disk", "drain", "own error", "unable", "hang", "power")


def befall(run: TrainingSimulation, chance: random.Random) -> str:
    """Let one misfortune befall the run; returns what it was."""
    kind = chance.choice(MISFORTUNES)
    alive = [host for host in run.hosts.values() if not host.dead and not host.silent]
    nodes = sorted({host.node for host in run.members()})
    if kind == "kill" and alive:
        run.kill(chance.choice(alive))
    elif kind == "stop" and alive:
        run.stop_process(chance.choice(alive), chance.uniform(1, 40))
    elif kind == "hang" and run.members():
        run.hang(chance.choice(run.members()))
    elif kind == "slow storage":
        run.slow_storage(chance.uniform(5, 30), chance.uniform(2, 20))
    elif kind == "full disk":
        run.full_storage(chance.uniform(2, 20))
    elif kind in ("own error", "unable"):
        run.trouble("failed" if kind == "own error" else "unable")
    elif kind in ("cut", "drain", "power") and len(nodes) > (kind != "drain"):
        node = chance.choice(nodes)
        {"cut": lambda: run.cut_link(node, chance.uniform(2, 40)), "drain": lambda: run.drain(node),
         "power": lambda: run.lose_node(node)}[kind]()  # fmt: skip
    return kind
