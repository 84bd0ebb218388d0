"""The journal: every event of a run as a line of JSON on the driver's disk, the only record that commits wait for.

The journal's directory holds ``id``, segments named ``FIRST-WRITER.jsonl`` after the number of their first event and
after their driver, and for every sink that keeps none of its own a file ``NAME.position`` with the number of the next
event that it needs. A driver writes segments of its own only, so one that was taken over damages nothing.
"""

import hashlib
import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from cluster.elastic.events import Event
from doge.common.errors import UserError
from doge.common.storage import Storage, private_cache

SEGMENT_BYTES = 8 * 2**20  # after which another segment begins
BATCH = 500  # the most events that a reader returns at once


@dataclass(frozen=True)
class Entry:
    """An event in the journal.

    Args:
        number: of the event in its journal, counted from 0.
        time: when it was appended, in seconds since 1970.
    """

    number: int
    time: float
    event: Event


@dataclass(frozen=True)
class Segment:
    """One file of a journal.

    Args:
        first: number of its first event.
        end: number after that of its last event.
        size: bytes that are safely written.
    """

    path: Path
    first: int
    end: int
    size: int


def journal_directory(run: Storage) -> Path:
    """The local directory of a run's journal: inside the run's directory, or in this user's cache if that is remote."""
    if run.is_local:
        return Path(run.path("journal"))
    return Path(private_cache(), "journals", hashlib.sha256(run.root.encode()).hexdigest()[:16])


class Journal:
    """Appends events durably and reads them from any position. Thread-safe; nothing is written before the first append.

    Args:
        directory: local; one driver at a time writes there.
        segment_bytes: size at which another segment begins.

    Raises:
        OSError: the directory cannot be read.
    """

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES):
        self.directory = directory
        self.unknown: Counter[str] = Counter()
        """Events that were skipped because this version cannot read them, by kind."""
        self._segment_bytes, self._writer = segment_bytes, uuid.uuid4().hex[:8]
        self._changed = threading.Condition()
        self._unknown_until = 0
        self._segments = _segments([directory / name for name in self._names()])
        try:
            self.id = (directory / "id").read_text()
        except FileNotFoundError:
            self.id = uuid.uuid4().hex
        """A position counts in the journal with this id alone."""
        self.start = self.end
        """Number of the first event of this driver."""

    @property
    def first(self) -> int:
        """Number of the first event that is still there."""
        return self._segments[0].first if self._segments else 0

    @property
    def end(self) -> int:
        """Number that the next event will have."""
        return self._segments[-1].end if self._segments else 0

    def append(self, events: Sequence[Event]) -> None:
        """Write events and flush them to the disk; all of them or, where that fails, none.

        Raises:
            OSError: they cannot be written now.
            UserError: another driver writes this journal by now.
        """
        if not events:
            return
        with self._changed:
            segment = self._writable_segment()
            now = time.time()
            lines = b"".join(_line(segment.end + at, now, event) for at, event in enumerate(events))
            with open(segment.path, "r+b") as file:  # must exist: a directory that has vanished is an error
                file.truncate(segment.size)  # drop what a failed attempt left
                file.seek(segment.size)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            self._segments[-1] = replace(segment, end=segment.end + len(events), size=segment.size + len(lines))
            self._changed.notify_all()

    def reader(self, position: int) -> "Reader":
        """Read the events from number ``position`` on."""
        return Reader(self, position)

    def wait(self, position: int, over: threading.Event) -> None:
        """Return once the event with this number is there, or once ``over`` is set and `wake` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self.end > position or over.is_set())

    def wake(self) -> None:
        """Let those that wait for events look again whether it is over."""
        with self._changed:
            self._changed.notify_all()

    def segment_of(self, number: int) -> Segment | None:
        """The segment that holds the event with this number, or the first one after it."""
        with self._changed:
            return next((segment for segment in self._segments if number < segment.end), None)

    def position(self, sink: str) -> int:
        """Number of the next event that a sink needs: where it has got to, or the first."""
        try:
            found = int((self.directory / f"{sink}.position").read_text())
        except (FileNotFoundError, ValueError):
            return self.first
        return min(max(found, self.first), self.end)

    def save_position(self, sink: str, position: int) -> None:
        """Remember how far a sink has got; raises OSError."""
        temporary = self.directory / f"{sink}.position.partial"
        temporary.write_text(str(position))
        os.replace(temporary, self.directory / f"{sink}.position")

    def trim(self, position: int) -> None:
        """Delete the segments that hold only events before ``position``, but for the newest."""
        with self._changed:
            while len(self._segments) > 1 and self._segments[0].end <= position:
                self._segments[0].path.unlink(missing_ok=True)
                del self._segments[0]

    def note_unknown(self, number: int, kind: str) -> None:
        """Count an event that a reader could not read; several readers count it once."""
        with self._changed:
            if number >= self._unknown_until:
                self._unknown_until = number + 1
                self.unknown[kind] += 1

    def _writable_segment(self) -> Segment:
        """The newest segment, which must be this driver's own; another one where that is full or there is none."""
        newest = self._segments[-1] if self._segments else None
        if newest is not None and newest.path.stem.endswith(self._writer):
            if self._names()[-1:] != [newest.path.name]:
                raise UserError(f"Another process writes the journal {self.directory}: a run can have one driver only.")
            if newest.size < self._segment_bytes:
                return newest
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "id").write_text(self.id)
        segment = Segment(self.directory / f"{self.end:012d}-{self._writer}.jsonl", self.end, self.end, 0)
        segment.path.touch()
        _flush_directory(self.directory)
        if newest is not None and newest.first == newest.end:  # an earlier driver's, in which there is nothing
            newest.path.unlink(missing_ok=True)
            self._segments.pop()
        self._segments.append(segment)
        return segment

    def _names(self) -> list[str]:
        """File names of the segments on the disk, the newest last."""

        def age(name: str) -> tuple[int, bool]:
            first, writer = name.removesuffix(".jsonl").split("-")
            return int(first), writer == self._writer

        return sorted((path.name for path in self.directory.glob("*.jsonl")), key=age)


class Reader:
    """Reads a journal's events in order, each once.

    Args:
        position: number of the event to begin with.
    """

    def __init__(self, journal: Journal, position: int):
        self.position = position
        """Number of the next event to read."""
        self._journal = journal
        self._path: Path | None = None
        self._offset = 0  # bytes into the file at `path`

    def read(self, limit: int = BATCH) -> list[Entry]:
        """The next events, at most ``limit``; empty where there are none yet. Raises OSError."""
        entries: list[Entry] = []
        before = self.position, self._path, self._offset
        try:
            while len(entries) < limit and (segment := self._journal.segment_of(self.position)) is not None:
                self._read_segment(segment, entries, limit)
        except OSError:
            self.position, self._path, self._offset = before
            raise
        return entries

    def _read_segment(self, segment: Segment, entries: list[Entry], limit: int) -> None:
        if segment.path != self._path:
            self._path, self._offset = segment.path, 0
        with open(segment.path, "rb") as file:
            file.seek(self._offset)
            while len(entries) < limit and self.position < segment.end:
                line = file.readline()
                if not line or file.tell() > segment.size:  # what is missing was torn or taken over
                    self.position = segment.end
                    break
                self._offset = file.tell()
                values = _values(line)
                if values is None or not self.position <= values["number"] < segment.end:
                    continue
                self.position = values["number"] + 1
                event = _event(values["kind"], values["event"])
                if event is None:
                    self._journal.note_unknown(values["number"], values["kind"])
                else:
                    entries.append(Entry(values["number"], values["time"], event))


def _segments(paths: Sequence[Path]) -> list[Segment]:
    """The segments of earlier drivers: each ends where the next begins, the last one with its last whole line."""
    firsts = [int(path.name.split("-")[0]) for path in paths]
    ends = firsts[1:] + ([_end_of(paths[-1], firsts[-1])] if paths else [])
    return [
        Segment(path, first, end, path.stat().st_size) for path, first, end in zip(paths, firsts, ends, strict=True)
    ]


def _line(number: int, now: float, event: Event) -> bytes:
    values = {"number": number, "time": now, "kind": type(event).__name__, "event": vars(event)}
    return json.dumps(values, default=float).encode() + b"\n"  # of numpy and torch there are only numbers


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None if it is torn or damaged."""
    try:
        values = json.loads(line)
        return values if line.endswith(b"\n") and {"number", "time", "kind", "event"} <= values.keys() else None
    except (ValueError, AttributeError):
        return None


def _event(kind: str, fields: dict[str, Any]) -> Event | None:
    """The event; None if its kind is unknown or a field is missing. Unknown fields are ignored."""
    if kind not in Event.kinds:
        return None
    try:
        return _adapter(kind).validate_python(fields)
    except pydantic.ValidationError:
        return None


@cache
def _adapter(kind: str) -> pydantic.TypeAdapter[Event]:
    return pydantic.TypeAdapter(Event.kinds[kind])


def _end_of(path: Path, first: int) -> int:
    """Number after that of a segment's last whole line."""
    values = (_values(line) for line in reversed(path.read_bytes().splitlines(keepends=True)))
    return next((max(first, found["number"] + 1) for found in values if found is not None), first)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
