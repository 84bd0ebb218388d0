"""The most units that a host takes at once: learnt from its own memory, and unlearnt."""

import time
from collections.abc import Callable

FIRST_SECONDS, LONGEST_SECONDS = 600.0, 4 * 3600.0


class MemoryLimit:
    """What was found to fit, or less for a while after it did not: a passing tenant may have taken the memory.

    A lowered limit holds for ten minutes. Then the found one is tried again, by the step itself; where that fails, the
    lowered one holds for twice as long as before.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._found, self._lowered = 0, 0
        self._work: object = None
        self._until, self._seconds = float("-inf"), FIRST_SECONDS

    @property
    def now(self) -> int:
        """Units; 0 is unknown."""
        return min(self._found, self._lowered) if self._clock() < self._until else self._found

    def find(self, size: int, work: object) -> None:
        """Note the size that fits in this device, and for what work; for other work nothing lowered counts."""
        if work != self._work:
            self._until, self._seconds = float("-inf"), FIRST_SECONDS
        self._found, self._work = size, work

    def lower(self, size: int) -> None:
        """Note that more than ``size`` did not fit this time."""
        if self._until > float("-inf"):
            again = self._clock() >= self._until  # it was tried once more, and did not fit again
            self._seconds = min(2 * self._seconds, LONGEST_SECONDS) if again else self._seconds
        self._lowered, self._until = size, self._clock() + self._seconds
