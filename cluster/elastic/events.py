"""What happens in a run, as plain data: the driver appends every event to its journal, and sinks read it from there.

An event travels from any process to the driver and lasts in the journal as JSON, so its fields are numbers, strings,
and lists and mappings of these. Times are seconds of the driver's monotonic clock.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events; a subclass is known to the journal by its name, which must be unique."""

    kinds: ClassVar[dict[str, type["Event"]]] = {}

    def __init_subclass__(cls) -> None:
        other = Event.kinds.setdefault(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two events are named {cls.__name__}: in {other.__module__} and in {cls.__module__}")
        Event.kinds[cls.__name__] = cls


@dataclass(frozen=True)
class Message(Event):
    """A sentence for whoever watches the run."""

    text: str


@dataclass(frozen=True)
class HostStarting(Event):
    """A process for a host is being started and takes its share of a machine.

    Args:
        replaces: whether it takes the place of a host that was lost.
    """

    host: str
    replaces: bool
    at: float


@dataclass(frozen=True)
class HostStarted(Event):
    """A host's process is ready, or gone."""

    host: str
    at: float


@dataclass(frozen=True)
class HostJoined(Event):
    """A host is used for the first time.

    Args:
        node: the name that a reader knows it by.
        at: when the host was asked for, or, of a spare, when it was put to work.
    """

    host: str
    node: str
    at: float


@dataclass(frozen=True)
class HostLeft(Event):
    """A host that was used has died or was let go."""

    host: str
    at: float


@dataclass(frozen=True)
class MembershipFormed(Event):
    """Hosts begin to step together.

    Args:
        number: of the membership in this call of the run.
        at: when forming it began.
        world_size: hosts in it.
        from_step: steps made in the state that it starts from.
        reached: the most steps that any membership has made.
        formed_s: seconds that forming it took.
        lost_s: seconds from a loss to ``at``; None where none was lost.
    """

    number: int
    at: float
    world_size: int
    from_step: int
    reached: int
    formed_s: float
    lost_s: float | None
