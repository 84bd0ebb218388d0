"""Sides of a comparison that run at the same time and yet alone: each has the whole machine, in turns of a moment.

A machine whose speed wanders is as fast for one side as for the other, and a side that does not need all of its turn
leaves nothing to the others.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

import psutil

TURN_SECONDS = 0.2


class Turns:
    """Processes of this machine that are stopped (SIGSTOP) while it is not their side's turn, inside the block.

    Args:
        sides: pids of the processes of each side; whatever they start belongs to the side as well, also when they die
            before it.
        turn_seconds: of a turn.
    """

    def __init__(self, *sides: Iterable[int], turn_seconds: float = TURN_SECONDS):
        self._sides, self._turn_seconds = [set(side) for side in sides], turn_seconds
        self.seconds = [0.0] * len(sides)
        """What each side has had."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._alternate, daemon=True)

    def __enter__(self) -> "Turns":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _alternate(self) -> None:
        try:
            for side in range(len(self._sides)):
                self._stop(side)
            for number in count():
                side = number % len(self._sides)
                began = time.monotonic()
                self._continue(side)
                # By what it has had, so that being late does not add up.
                rest = self._turn_seconds * (number // len(self._sides) + 1) - self.seconds[side]
                over = self._over.wait(max(0.0, rest))
                self._stop(side)
                self.seconds[side] += time.monotonic() - began
                if over:
                    return
        finally:
            for side in range(len(self._sides)):
                self._continue(side)

    def _stop(self, side: int) -> None:
        """Stop all that belongs to a side; a process that one of them started before it was stopped is found too."""
        stopped: set[int] = set()
        while new := self._sides[side] - stopped:
            _send(new, signal.SIGSTOP)
            stopped |= new
            self._sides[side] = _with_children(self._sides[side])

    def _continue(self, side: int) -> None:
        _send(self._sides[side], signal.SIGCONT)


def _with_children(pids: set[int]) -> set[int]:
    """Those of some processes that live, and all that they started and those did."""
    parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
    family, new = set(), pids & parents.keys()
    while new:
        family |= new
        new = {pid for pid, parent in parents.items() if parent in new} - family
    return family


def _send(pids: set[int], which: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, which)
