"""The words of elasticity: seats that Ray Train holds, hosts that train in them, memberships that they form.

A *seat* is the room for one worker on a node, reserved by a worker of Ray Train. A *host* is a process that has
imported everything and trains in a seat; it outlives Ray Train's restarts. A *membership* is a set of hosts that step
together, numbered from 1. It ends when a host is lost, or at a step that all of its members agree on.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Process = tuple[int, int | None]  # its id, and when it started


@dataclass(frozen=True)
class Seat:
    """One worker of Ray Train.

    Args:
        group: id of its worker group, of which a restart makes another.
        rank: in that group.
        size: of that group.
        node: Ray's id of its node.
        gpus: ids of the GPUs that it reserves.
    """

    group: str
    rank: int
    size: int
    node: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, order=True)
class StateId:
    """What state it is: hosts whose states have one id hold equal ones.

    Args:
        step: steps made in it.
        membership: number of the one in which its last step was made, or that took it up; 0 for one from the storage.
    """

    step: int
    membership: int = 0


@dataclass(frozen=True)
class Member:
    """A host in a membership.

    Args:
        host: its name.
        node: Ray's id of its node.
        machine: id of what its cores belong to, which several nodes may share.
        gpus: ids of the GPUs that it computes on.
        predecessor: the process that computed on them before, and may not have given back their memory yet.
    """

    host: str
    node: str
    machine: str
    gpus: tuple[str, ...] = ()
    predecessor: Process | None = None


@dataclass(frozen=True)
class Membership:
    """Hosts that step together.

    Args:
        number: of the membership in this call of the run.
        members: in the order of their ranks.
        address: host and port where rank 0 listens.
        start: the state to go on from, which its members hold or are given; None for a fresh start.
    """

    number: int
    members: tuple[Member, ...]
    address: tuple[str, int]
    start: StateId | None = None

    def sharing_cores(self, rank: int) -> int:
        """The number of members that compute on the cores of the one with this rank, itself included."""
        return sum(member.machine == self.members[rank].machine for member in self.members)


@dataclass(frozen=True)
class Outcome:
    """How a membership ended for one of its hosts.

    Args:
        kind: ``finished`` the run, ``left`` at an agreed step, ``broken`` by another's end, ``failed`` by an error of
            this process, ``unable`` by trouble of its machine, ``full`` memory, or ``stopped`` for good.
        step: steps that were made when it ended.
        reason: the error in one line.
        seconds: of what came before the first step, by name.
    """

    kind: Literal["finished", "left", "broken", "failed", "unable", "full", "stopped"]
    step: int
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HostInfo:
    """A host's process, as it describes itself once it is ready.

    Args:
        machine: host name, for people.
        cores: id of the cores that it shares with the other hosts there.
        started: when the process started, which tells it from a later one with its id.
    """

    pid: int
    machine: str
    ip: str
    cores: str = ""
    started: int | None = None


@dataclass(frozen=True)
class Offer:
    """The newest state that a host or the storage has.

    Args:
        state: its id; None for a fresh start.
        references: one to the state in the object store, if it was asked for and there is a state.
        trouble: storage error; if set, ignore the other fields.
    """

    state: StateId | None = None
    references: tuple[Any, ...] = ()
    trouble: str = ""


def node_name(machine: str, node: str) -> str:
    """A node's name for people: its machine, and enough of Ray's id to tell several nodes of one machine apart."""
    return f"{machine}-{node[:4]}"
