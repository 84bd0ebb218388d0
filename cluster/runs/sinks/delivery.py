"""Delivery of the journal's events to the sinks, each in a thread of its own, so that none holds anything up."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from cluster.runs.journal import Journal
from cluster.runs.sinks.sink import Sink
from doge.common.words import count

WATCH_SECONDS = 1.0
HANG_SECONDS = 20.0  # after which one call of a sink is said to hang
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 1.0, 30.0  # between two attempts of a sink that fails
CLOSING_PAUSE_SECONDS = 1.0  # the longest between two attempts once the run is over

T = TypeVar("T")


class _GivenUp(Exception):
    """The run is over and nobody waits for this sink any more."""


class SinkThread:
    """Hands a sink the journal's events in order and tries again, ever more rarely, for as long as that fails.

    Args:
        say: takes a sentence for whoever watches the run.
        on_progress: called whenever the sink has got further.
    """

    def __init__(self, sink: Sink, journal: Journal, say: Callable[[str], None], on_progress: Callable[[], None]):
        self.sink = sink
        self.position = -1
        """Number of the next event to hand over; -1 before that is known."""
        self.needed = 0
        """Number of the first event that a later driver may still need."""
        self.error: Exception | None = None
        """Why the last attempt failed; None while none did."""
        self.closed = False
        """Whether everything is handled and the sink is closed."""
        self._journal, self._say, self._on_progress = journal, say, on_progress
        self._began: float | None = None  # when the call under way began, monotonic
        self._said = False  # that it lags behind
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"{sink.name} sink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let it end after the last event; does not wait for that."""
        self._closing.set()
        self._journal.wake()
        self._notify()

    def give_up(self) -> None:
        """Let it end after the call under way."""
        self._given_up.set()
        self.close()

    def wait(self, condition: Callable[["SinkThread"], bool], seconds: float) -> bool:
        """Whether the thread comes to meet a condition within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self), max(0.0, seconds))

    def look(self) -> None:
        """Say once if the sink hangs."""
        began = self._began
        if began is not None and time.monotonic() - began > HANG_SECONDS:
            self.note_lag(f"it has not answered for {time.monotonic() - began:.0f} s.")

    def note_lag(self, reason: str) -> None:
        """Say once that the sink lags behind."""
        if not self._said:
            self._said = True
            self._say(f"{self.sink.name} cannot be written now, nothing waits for it and it catches up later: {reason}")

    def _work(self) -> None:
        with suppress(_GivenUp):
            first = self._insist(lambda: self.sink.position(self._journal))
            reader = self._journal.reader(first)
            self.needed = first
            self._advance(first)
            while True:
                last = self._closing.is_set()  # no event is appended after that
                entries = self._insist(reader.read)
                if entries:
                    self._insist(lambda: self.sink.handle(entries))  # noqa: B023, called at once
                if reader.position > self.position:
                    self._advance(reader.position)
                if not entries and last:
                    break
                self._journal.wait(reader.position, self._closing)
            self._insist(self.sink.close)
            self._advance(reader.position)
            self.closed = True
            self._notify()

    def _advance(self, position: int) -> None:
        self.needed = self._insist(lambda: self.sink.saved(self._journal, position))
        self.position = position
        self._notify()
        self._on_progress()

    def _insist(self, act: Callable[[], T]) -> T:
        """Call ``act`` until it succeeds; raises _GivenUp."""
        pause, failures = FIRST_PAUSE_SECONDS, 0
        while True:
            self._began = time.monotonic()
            try:
                result = act()
            except Exception as error:  # of whatever kind: it is the sink's trouble and nobody else's
                self._began, self.error, failures = None, error, failures + 1
                if failures > 1 and not self._given_up.is_set():  # a single failure is not worth a line
                    self.note_lag(str(error) or repr(error))
                self._notify()
                self._pause(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
                continue
            self._began, self.error = None, None
            if self._said:
                self._said = False
                self._say(f"{self.sink.name} can be written again.")
            return result

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._closing.is_set():
                self._changed.wait_for(self._closing.is_set, seconds)
            else:
                self._changed.wait_for(self._given_up.is_set, min(seconds, CLOSING_PAUSE_SECONDS))
        if self._given_up.is_set():
            raise _GivenUp

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Delivery:
    """All sinks of a run at work, from `start` to `close`.

    Args:
        say: takes a sentence for whoever watches the run; called from any thread.
    """

    def __init__(self, journal: Journal, sinks: Sequence[Sink], say: Callable[[str], None]):
        self._journal, self._say = journal, say
        self._threads = [SinkThread(sink, journal, say, self._trim) for sink in sinks]
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="sinks", daemon=True)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._watch.start()

    def thread(self, sink: Sink) -> SinkThread:
        return next(thread for thread in self._threads if thread.sink is sink)

    def catch_up(self, sinks: Sequence[Sink], seconds: float) -> bool:
        """Whether these sinks have handled all events that are in the journal now, within so many seconds."""
        end, deadline = self._journal.end, time.monotonic() + seconds
        threads = [self.thread(sink) for sink in sinks]
        return all(thread.wait(lambda t: t.position >= end, deadline - time.monotonic()) for thread in threads)

    def close(self, seconds: float | None = None) -> dict[str, str]:
        """Give every sink its time, but at most ``seconds``, to deal with all that is left.

        Returns:
            For each that did not, by its name, a sentence that says what is missing.
        """
        began, missing = time.monotonic(), {}
        for thread in self._threads:
            thread.close()
        for thread in self._threads:
            patience = thread.sink.close_seconds if seconds is None else min(seconds, thread.sink.close_seconds)
            if not thread.wait(lambda t: t.closed, began + patience - time.monotonic()):
                left, reason = self._journal.end - thread.needed, thread.error or "it does not answer"
                if left > 0:
                    missing[thread.sink.name] = (
                        f"{thread.sink.name} has not got the last {count(left, 'event')} of the run ({reason}). "
                        f"They are kept in {self._journal.directory}: run the same command again to deliver them."
                    )
            thread.give_up()
        self._over.set()
        self._journal.wake()
        if self._journal.unknown:
            kinds = ", ".join(f"{number} of the kind {kind}" for kind, number in self._journal.unknown.items())
            self._say(f"Events of another version that cannot be read were left out: {kinds}.")
        return missing

    def _look(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            for thread in self._threads:
                thread.look()

    def _trim(self) -> None:
        self._journal.trim(min(thread.needed for thread in self._threads))
