"""Sides of a comparison that run at the same time and yet alone: each has the whole machine, in turns of a moment.

A machine whose speed wanders is as fast for one side as for the other, and a side that does not need all of its turn
leaves nothing to the others. Run as a script it is the process that stops and continues them: it lets all go on once
its input closes, as it does when its owner dies.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

import psutil

TURN_SECONDS = 0.2


class Turns:
    """Processes of this machine that are stopped (SIGSTOP) while it is not their side's turn, inside the block.

    Args:
        sides: pids of the processes of each side; whatever they start belongs to the side as well, also after they
            died if it was seen at a turn before.
        turn_seconds: of a turn.

    Raises:
        RuntimeError: at the end of the block, if the turns ended before it.
    """

    def __init__(self, *sides: Iterable[int], turn_seconds: float = TURN_SECONDS):
        self._sides, self._turn_seconds = [list(side) for side in sides], turn_seconds
        self.seconds = [0.0] * len(self._sides)
        """What each side has had, known after the block."""
        self.idle = 0.0
        """Share of the time that no side had, known after the block."""

    def __enter__(self) -> "Turns":
        command = [sys.executable, __file__, json.dumps([self._sides, self._turn_seconds])]
        pipe = subprocess.PIPE
        self._began = time.monotonic()
        self._holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        assert self._holder.stdout
        self._holder.stdout.readline()  # it has begun
        return self

    def __exit__(self, *_) -> None:
        told = self._holder.communicate()[0]
        if self._holder.returncode:
            raise RuntimeError("The process that gave each side its turn has failed.")
        self.seconds = json.loads(told)
        self.idle = 1 - sum(self.seconds) / (time.monotonic() - self._began)


def alternate(sides: list[set[int]], turn_seconds: float) -> list[float]:
    """Give each side its turn until the standard input closes; the seconds that each had."""
    seconds = [0.0] * len(sides)
    try:
        for side in range(len(sides)):
            _stop(sides, side)
        print("begun", flush=True)
        for number in count():
            side = number % len(sides)
            began = time.monotonic()
            _send(sides[side], signal.SIGCONT)
            # By what it has had, so that being late does not add up.
            rest = turn_seconds * (number // len(sides) + 1) - seconds[side]
            over = select.select([0], [], [], max(0.0, rest))[0]
            _stop(sides, side)
            seconds[side] += time.monotonic() - began
            if over:
                break
    finally:
        for pids in sides:
            _send(pids, signal.SIGCONT)
    return seconds


def _stop(sides: list[set[int]], side: int) -> None:
    """Stop all that belongs to a side; a process that one of them started before it was stopped is found too."""
    stopped: set[int] = set()
    while new := sides[side] - stopped:
        _send(new, signal.SIGSTOP)
        stopped |= new
        sides[side] = _with_children(sides[side])


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


if __name__ == "__main__":
    pids, turn_seconds = json.loads(sys.argv[1])
    print(json.dumps(alternate([set(side) for side in pids], turn_seconds)))
