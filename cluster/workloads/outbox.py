"""Events on their way from a host to the driver's board, sent by a thread of their own: no step waits for it."""

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
        self._waiting: list[Event] = []
        self._lock = threading.Lock()  # of what waits
        self._sending = threading.Lock()  # taken first
        self._posted, self._urgent = threading.Event(), threading.Event()
        threading.Thread(target=self._work, name="outbox", daemon=True).start()

    def post(self, event: Event, urgent: bool = True) -> None:
        """Let an event be sent, with all that wait; or soon, with others."""
        with self._lock:
            self._waiting.append(event)
        if urgent:
            self._urgent.set()
        self._posted.set()

    def flush(self) -> None:
        """Send all that wait, and return when they are sent."""
        with self._sending:
            with self._lock:
                events, self._waiting = self._waiting, []
                self._urgent.clear()
                self._posted.clear()
            if events:
                self._send(events)

    def _work(self) -> None:
        while True:
            self._posted.wait()
            self._urgent.wait(self._seconds)
            self.flush()
