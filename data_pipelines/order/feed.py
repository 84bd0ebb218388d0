"""Feeds: units of training or evaluation data, addressed by number, for the workers that share them out.

A *unit* is what is numbered, shared out and counted: here a packed sequence, elsewhere a pair or a prompt.

    feed = PackedSequencesConfig(plan.fingerprint).open(storage, print, print)
    for units in feed.prefetch((start, stop) for each step):
        ...
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from doge.common.storage import Storage


class Units(Protocol):
    """Consecutive units of a feed."""

    @property
    def samples(self) -> Sequence[tuple[Any, ...]]:
        """Where each unit lies, for the recorded samples."""

    def __len__(self) -> int:
        """The number of units."""

    def __getitem__(self, part: slice, /) -> "Units":
        """The units of a slice."""


UnitsT = TypeVar("UnitsT", bound=Units, covariant=True)


class Feed(Protocol[UnitsT]):
    """Units by number. Several threads may read one feed."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order of the units depends on: equal fingerprints, equal units."""

    @property
    def length(self) -> int | None:
        """The number of units; None for a feed that repeats its data without end."""

    def read(self, start: int, stop: int, stopped: threading.Event | None = None) -> UnitsT:
        """Read the units ``[start, stop)`` and wait for those that are not prepared yet.

        Where ``stopped`` is set meanwhile, the wait ends, and units may be missing.

        Raises:
            UserError: the units can never be read.
        """

    def prefetch(self, ranges: Iterable[tuple[int, int]], depth: int = 2) -> "ReadAhead[UnitsT]":
        """Read each range in turn in a background thread, up to ``depth`` ranges ahead."""

    def cost(self, unit: int) -> float:
        """The cost of computing one unit, relative to the other units of the feed."""


class FeedConfig(Protocol):
    """A picklable and hashable description of a feed, which any process can open."""

    @property
    def fingerprint(self) -> str:
        """Names the feed in a checkpoint: another one means other units."""

    def open(self, storage: Storage, on_wait: Callable[[str], None], on_trouble: Callable[[str], None]) -> Feed[Units]:
        """Open the feed.

        Args:
            storage: root of everything durable.
            on_wait: called with a sentence when a unit is not prepared yet, and at least every 30 s while a wait lasts,
                with an empty one where there is nothing new to say.
            on_trouble: called with a sentence when this machine cannot read the storage, and when it can again.

        Raises:
            UserError: the storage does not hold this feed.
        """


class ReadAhead(Iterator[UnitsT], Generic[UnitsT]):
    """Iterator over ranges of units that a background thread reads ahead. Close it after use.

    An error of the thread is raised by the iterator, after the units that were read before it.

    Args:
        read: reads the units ``[start, stop)``; returns early, with anything, once the event is set.
        ranges: (start, stop) of each item.
        depth: the most items that are held ready.
    """

    def __init__(
        self,
        read: Callable[[int, int, threading.Event], UnitsT],
        ranges: Iterable[tuple[int, int]],
        depth: int,
    ):
        self._read, self._ranges = read, ranges
        self._ready: deque[UnitsT | BaseException] = deque()
        self._depth = depth
        self._change = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> UnitsT:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._stopped.is_set())
            if self._stopped.is_set():
                raise RuntimeError("Reading ahead was stopped.")
            item = self._ready[0] if isinstance(self._ready[0], BaseException) else self._ready.popleft()
            self._change.notify_all()
        if isinstance(item, BaseException):
            self._thread.join()
            raise item
        return item

    def stop(self) -> None:
        """Stop reading; a thread that waits for the next item gets a RuntimeError. Thread-safe."""
        with self._change:
            self._stopped.set()
            self._change.notify_all()

    def close(self) -> None:
        """Stop reading and wait for the background thread to end."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        try:
            for start, stop in self._ranges:
                units = self._read(start, stop, self._stopped)
                if not self._put(units):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: UnitsT | BaseException) -> bool:
        """Add an item once there is room; False if reading was stopped."""
        with self._change:
            self._change.wait_for(lambda: len(self._ready) < self._depth or self._stopped.is_set())
            if not self._stopped.is_set():
                self._ready.append(item)
                self._change.notify_all()
            return not self._stopped.is_set()
