"""Patience with a storage that is away for a while: a reader waits and tries again, instead of failing."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from doge.common.storage import CacheError, StorageError

FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 1.0, 30.0  # between two attempts
GIVE_UP_SECONDS = 600.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Patience:
    """Reads of one storage, each tried again with growing pauses until it succeeds. Several threads may share one.

    Args:
        on_attempt: called before every pause; what it raises ends the wait.
        say: called with a sentence when the storage begins to fail, and when it is back.
    """

    def __init__(self, on_attempt: Callable[[], object], say: Callable[[str], object] = _log.warning):
        self._on_attempt, self._say = on_attempt, say
        self._lock = threading.Lock()
        self._failing_since: float | None = None

    def read(self, act: Callable[[], T], stopped: threading.Event) -> T:
        """What ``act`` returns.

        Raises:
            StorageError: it failed for ten minutes, or ``stopped`` was set while it failed, or the trouble is this
                machine's own cache, which another machine does not have.
        """
        pause, deadline = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                found = act()
            except CacheError:
                raise
            except StorageError as error:
                deadline = deadline or time.monotonic() + GIVE_UP_SECONDS
                self._note_failure(error)
                self._on_attempt()
                if time.monotonic() + pause > deadline or stopped.wait(pause):
                    with self._lock:
                        self._failing_since = None  # another read tells of it anew
                    raise
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            else:
                if deadline is not None:  # what did not fail may not have asked the storage
                    self._note_success()
                return found

    def _note_failure(self, error: StorageError) -> None:
        with self._lock:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                reason = str(error).rstrip(".")
                self._say(
                    f"{socket.gethostname()} cannot read its data ({reason}): it waits and tries again for "
                    f"{GIVE_UP_SECONDS / 60:g} minutes."
                )

    def _note_success(self) -> None:
        with self._lock:
            if self._failing_since is not None:
                seconds = time.monotonic() - self._failing_since
                self._failing_since = None
                self._say(f"{socket.gethostname()} can read its data again, after {seconds:,.0f} s.")
