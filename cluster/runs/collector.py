"""The collector: takes the events from the board to the journal, which is all that a commit waits for."""

import threading
import time
from collections.abc import Callable

from cluster.runs.board import BoardLost, DriverBoard
from cluster.runs.journal import Journal
from doge.common.errors import UserError

POLL_SECONDS = 0.25
WAIT_MESSAGE_SECONDS = 60
PATIENCE_SECONDS = 600  # with a disk that fails, once the run is over


class Collector:
    """Works in a thread of its own for as long as its context lasts.

    While the journal cannot be written, commits wait. Where it never can be again, the run is stopped. Where the board
    has ended, so has this thread, and `lost` says why.

    Args:
        say: takes a sentence for whoever watches the run.
    """

    def __init__(self, board: DriverBoard, journal: Journal, say: Callable[[str], None]):
        self._board, self._journal, self._say = board, journal, say
        self._thread = threading.Thread(target=self._follow, name="collector", daemon=True)
        self._over = threading.Event()
        self.lost: BoardLost | None = None

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Return once everything that was posted is in the journal, or once that was given up."""
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            self._work()
        except BoardLost as error:
            self.lost = error

    def _work(self) -> None:
        started, told, journaled, recording = time.monotonic(), False, 0, True
        failing_since, pause = 0.0, 0.0
        last = False
        while not last:
            last = self._over.wait(pause or POLL_SECONDS)
            if pause and last:
                time.sleep(min(pause, 1.0))  # the event is set and does not wait any more
            if not (journaled or told) and time.monotonic() - started > WAIT_MESSAGE_SECONDS:
                told = True
                self._say("Waiting for the cluster to have room for the workers, and for them to start.")
            events = self._board.take(journaled)
            try:
                if recording:
                    self._journal.append(events)
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                patient = not last or time.monotonic() - failing_since < PATIENCE_SECONDS
                if isinstance(error, OSError) and patient:
                    if not pause:
                        self._say(
                            f"The run cannot be recorded in {self._journal.directory} now ({error.strerror or error}): "
                            "training goes on, and checkpoints wait until it can."
                        )
                    pause, last = min(2 * pause or 1.0, 30.0), False
                    continue
                self._board.stop(self._reason(error), unrecorded=True)
                recording = False  # what follows a gap must not be recorded
            if pause and recording:
                self._say("The run is recorded again.")
            failing_since, pause = 0.0, 0.0
            journaled += len(events)
        self._board.take(journaled)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, OSError):
            return (
                f"The run could not be recorded in {self._journal.directory} ({error.strerror or error}): make room "
                "there and run the same command to resume."
            )
        return f"Recording the run failed: {error!r}."
