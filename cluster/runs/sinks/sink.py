"""The base classes of sinks, which follow a run's events."""

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from cluster.elastic.events import Event
from cluster.runs.journal import Entry, Journal
from doge.common.storage import Storage

WRITE_SECONDS = 30.0  # between two writes of a sink that keeps a state


class Sink(ABC):
    """Deals with a run's events in a thread of its own: it may be slow, fail, hang and catch up.

    ``position``, ``handle``, ``saved`` and ``close`` are called one after another in that thread. One that raises is
    called again later with the same arguments, by this driver or the next, so doing it again must change nothing.
    """

    name: ClassVar[str]
    """Name in the journal's directory and in messages."""
    close_seconds: ClassVar[float] = 60.0
    """Seconds that the end of a run waits for this sink."""

    def position(self, journal: Journal) -> int:
        """Number of the first event that it needs."""
        return journal.position(self.name)

    @abstractmethod
    def handle(self, entries: Sequence[Entry]) -> None:
        """Deal with the next events."""

    def saved(self, journal: Journal, position: int) -> int:
        """Remember that all events before ``position`` were handled; returns the first that may be needed again."""
        journal.save_position(self.name, position)
        return position

    def close(self) -> None:  # noqa: B027, most have nothing left to do
        """Do what is left after the last event."""


class StateSink(Sink):
    """A sink that keeps a state in memory and writes it, now and then, to a file in the run's directory.

    The file holds the position up to which it knows the events, so that each of them counts once, whenever a driver
    dies. What other threads read of the state they read with ``lock`` held.
    """

    def __init__(self, directory: Storage, file: str):
        self.lock = threading.Lock()
        self._directory, self._file = directory, file
        self._journal_id = ""
        self._next = self._written = 0  # numbers of the next event to take in, and of the first not yet in the file
        self._write_at = 0.0  # monotonic

    @abstractmethod
    def take(self, event: Event) -> None:
        """Take an event into the state."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""

    @abstractmethod
    def restore(self, values: dict[str, Any]) -> None:
        """Take over a state that an earlier driver wrote; may raise ValueError, KeyError or TypeError."""

    def position(self, journal: Journal) -> int:
        values: dict[str, Any] = {}
        try:
            values = json.loads(self._directory.read_bytes(self._file))
            self.restore(values)
            known = values.get("journal") == journal.id
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # a broken one is not worth a run
            known = False
        start = int(values["position"]) if known else journal.first
        self._next = self._written = min(max(start, journal.first), journal.end)
        self._journal_id, self._write_at = journal.id, time.monotonic() + WRITE_SECONDS
        return self._next

    def handle(self, entries: Sequence[Entry]) -> None:
        with self.lock:
            for entry in entries:
                if entry.number >= self._next:
                    self._next = entry.number + 1
                    self.take(entry.event)
        if time.monotonic() >= self._write_at:
            self._write()

    def saved(self, journal: Journal, position: int) -> int:
        return self._written

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        """Raises StorageError."""
        place = {"journal": self._journal_id, "position": self._next}
        self._directory.write_bytes(self._file, json.dumps(self.to_dict() | place).encode())
        self._written, self._write_at = self._next, time.monotonic() + WRITE_SECONDS
