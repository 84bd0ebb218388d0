"""Events on their way from a host to the driver's board: those that can wait a little travel together."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from cluster.elastic.events import Event

WAIT_SECONDS = 0.5  # that an event may wait for others


class Outbox:
    """Keeps the order of events. Any thread may post.

    Args:
        send: takes some events; nothing waits for its result.
        wait_seconds: that an event which is not urgent may wait for others.
    """

    def __init__(self, send: Callable[[Sequence[Event]], Any], wait_seconds: float = WAIT_SECONDS):
        self._send, self._seconds = send, wait_seconds
        self._lock = threading.Lock()
        self._waiting: list[Event] = []
        self._timer: threading.Timer | None = None

    def post(self, event: Event, urgent: bool = True) -> None:
        """Send an event, with all that wait; or soon, with others."""
        with self._lock:
            self._waiting.append(event)
            if urgent:
                self._flush()
            elif self._timer is None:
                self._timer = threading.Timer(self._seconds, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Send all that wait."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            events, self._waiting = self._waiting, []
            self._send(events)
