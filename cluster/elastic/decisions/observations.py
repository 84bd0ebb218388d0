"""What the coordinator learns, one observation at a time."""

from dataclasses import dataclass

from cluster.elastic.membership import HostInfo, Outcome, Seat, StateId
from cluster.elastic.workload import Beat


@dataclass(frozen=True)
class Tick:
    """Time has passed; one comes every ``WATCH_SECONDS``."""


@dataclass(frozen=True)
class RunStopped:
    """The board says that the run is over."""


@dataclass(frozen=True)
class RunInterrupted:
    """The driver must go: what there is shall be committed first."""


@dataclass(frozen=True)
class SeatTaken:
    """A worker of Ray Train is there; the seats of its group count once the group is complete."""

    seat: Seat


@dataclass(frozen=True)
class NodesSeen:
    """Answer to `LookAtNodes`.

    Args:
        asked: time of the command.
        draining: Ray's ids of the nodes that will go soon.
        dead: ids of the nodes that Ray knows to be gone.
    """

    asked: float
    draining: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FromHost:
    """Base of what a host says; those of a host that is lost are ignored."""

    host: str


@dataclass(frozen=True)
class HostPrepared(FromHost):
    """The host's workload is made and warm."""

    info: HostInfo


@dataclass(frozen=True)
class HostFailed(FromHost):
    """A call to the host raised an error.

    Args:
        error: name of the error's type.
        sentence: the error in one line.
        died: the host's process is gone, or could not be started.
        user_error: the user's input is wrong, and every other host would fail alike.
    """

    error: str
    sentence: str = ""
    died: bool = False
    user_error: bool = False


@dataclass(frozen=True)
class BeatHeard(FromHost):
    """Answer to `AskForBeat`."""

    beat: Beat


@dataclass(frozen=True)
class Offered(FromHost):
    """Answer to `AskForOffer`.

    Args:
        state: id of the state on offer; None for a fresh start.
        trouble: storage error; if set, there is no offer.
        copied: whether there is a copy for other hosts.
    """

    state: StateId | None = None
    trouble: str = ""
    copied: bool = False


@dataclass(frozen=True)
class AddressGiven(FromHost):
    """Answer to `AskForAddress`."""

    address: tuple[str, int]


@dataclass(frozen=True)
class MemberEnded(FromHost):
    """Answer to `RunMember`."""

    outcome: Outcome


@dataclass(frozen=True)
class Flushed(FromHost):
    """Answer to `Flush`; also after an error."""


Observation = (
    Tick
    | RunStopped
    | RunInterrupted
    | SeatTaken
    | NodesSeen
    | HostPrepared
    | HostFailed
    | BeatHeard
    | Offered
    | AddressGiven
    | MemberEnded
    | Flushed
)
