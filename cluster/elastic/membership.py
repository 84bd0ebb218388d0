"""The words of elasticity: seats that Ray Train holds, hosts that train in them, memberships that they form.

A *seat* is the room for one worker on a node, reserved by a worker of Ray Train. A *host* is a process that has
imported everything and trains in a seat; it outlives Ray Train's restarts. A *membership* is a set of hosts that step
together, numbered from 1. It ends when a host is lost, or at a step that all of its members agree on.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


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


@dataclass(frozen=True)
class Member:
    """A host in a membership.

    Args:
        host: its name.
        node: Ray's id of its node.
        machine: host name of the machine, which several nodes may share.
        gpus: ids of the GPUs that it computes on.
    """

    host: str
    node: str
    machine: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Membership:
    """Hosts that step together.

    Args:
        number: of the membership in this call of the run.
        members: in the order of their ranks.
        address: host and port where rank 0 listens.
        source: host that has the state to go on from; the others are given it.
    """

    number: int
    members: tuple[Member, ...]
    address: tuple[str, int]
    source: str

    def local_rank(self, rank: int) -> tuple[int, int]:
        """Return a member's rank among the members on its machine, and the number of those."""
        machine = [place for place, member in enumerate(self.members) if member.machine == self.members[rank].machine]
        return machine.index(rank), len(machine)


@dataclass(frozen=True)
class Outcome:
    """How a membership ended for one of its hosts.

    Args:
        kind: ``finished`` the run, ``left`` at an agreed step, ``broken`` by an error, ``full`` memory, or ``stopped``
            for good.
        step: steps that were made when it ended.
        reason: the error in one line.
        seconds: of what came before the first step, by name.
    """

    kind: Literal["finished", "left", "broken", "full", "stopped"]
    step: int
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HostInfo:
    """A host's process, as it describes itself once it is ready."""

    pid: int
    machine: str
    ip: str


@dataclass(frozen=True)
class Offer:
    """The newest state that a host or the storage has.

    Args:
        step: steps made in it.
        references: one to the state in the object store, if it was asked for and there is a state.
        trouble: storage error; if set, ignore the other fields.
    """

    step: int = 0
    references: tuple[Any, ...] = ()
    trouble: str = ""


def node_name(machine: str, node: str) -> str:
    """A node's name for people: its machine, and enough of Ray's id to tell several nodes of one machine apart."""
    return f"{machine}-{node[:4]}"
