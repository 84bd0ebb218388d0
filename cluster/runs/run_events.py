"""Events of a run as a whole."""

from dataclasses import dataclass
from typing import Literal

from cluster.elastic.events import Event

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class FileWritten(Event):
    """A file of the run's directory that is worth showing beside the run.

    Args:
        name: relative to the run's directory.
    """

    name: str


@dataclass(frozen=True)
class RunEnded(Event):
    """The last event of a driver that ended by itself.

    Args:
        status: ``KILLED`` by the user, ``FAILED`` by an error.
    """

    status: Status
