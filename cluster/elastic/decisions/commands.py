"""What the coordinator is told to do.

A command that asks something of a host is answered by the observation that it names, or by `HostFailed`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.elastic.events import Event
from cluster.elastic.membership import Membership, Process


@dataclass(frozen=True)
class StartHost:
    """Start a host's process on a node and prepare its workload; `HostPrepared` answers.

    Args:
        aside: whether others that compute there go first meanwhile.
    """

    host: str
    node: str
    aside: bool


@dataclass(frozen=True)
class KillHost:
    """End a host's process.

    Args:
        process: one that may be stopped and hears no request: only a signal from its node ends it.
    """

    host: str
    node: str
    process: Process | None


@dataclass(frozen=True)
class AskForBeat:
    """Ask how a host is; `BeatHeard` answers."""

    host: str


Copy = Literal["always", "if new", "never"]


@dataclass(frozen=True)
class AskForOffer:
    """Ask a host for the newest state that it or the storage has; `Offered` answers.

    Args:
        copy: whether other hosts need the state; ``if new`` if it is another than the one that this host holds.
    """

    host: str
    copy: Copy


@dataclass(frozen=True)
class AskForAddress:
    """Ask where a host would listen as rank 0; `AddressGiven` answers."""

    host: str


@dataclass(frozen=True)
class RunMember:
    """Let a host take part in a membership until it ends; `MemberEnded` answers.

    Args:
        given: whether the host is given the state that was offered last.
    """

    host: str
    membership: Membership
    rank: int
    given: bool


@dataclass(frozen=True)
class AskToLeave:
    """Let a host end a membership at the next step that all members can agree on."""

    host: str
    number: int


@dataclass(frozen=True)
class Abort:
    """Let a host end a membership at once: it has lost a member, or somebody has to go."""

    host: str
    number: int


@dataclass(frozen=True)
class Commit:
    """Let a host in no membership hand the state that it holds to be written, unless it is."""

    host: str


@dataclass(frozen=True)
class Flush:
    """Wait until a host has written everything that it was handed to write; `Flushed` answers."""

    host: str


@dataclass(frozen=True)
class LookAtNodes:
    """Ask Ray which nodes are about to go and which are gone; `NodesSeen` answers."""

    asked: float


@dataclass(frozen=True)
class Post:
    """Tell the driver of an event."""

    event: Event


@dataclass(frozen=True)
class StopRun:
    """End the run for good, with a sentence."""

    reason: str


@dataclass(frozen=True)
class Finish:
    """Nothing is left to decide: end all hosts and give the seats back."""


Command = (
    StartHost
    | KillHost
    | AskForBeat
    | AskForOffer
    | AskForAddress
    | RunMember
    | AskToLeave
    | Abort
    | Commit
    | Flush
    | LookAtNodes
    | Post
    | StopRun
    | Finish
)
Commands = Iterator[Command]
