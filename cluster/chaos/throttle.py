"""Processes of this machine that are stopped and continued from outside, so that they get a share of their time.

Nothing here knows of Ray, and a throttled process knows of nothing.
"""

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from doge.common.errors import UserError

PERIOD = 0.05  # seconds between two stops of a throttled process

# Stops a process again and again, in a process of its own. That one is nobody's child, since Ray kills the children of
# a worker that it ends; and once its input closes, as it does when its owner dies, it continues the process and ends.
# It plans by what was, so that being late itself does not add up.
_HOLD = """
import os, select, sys, time
if os.fork():
    os._exit(0)
import psutil

now = time.monotonic
share, seconds, period = map(float, sys.argv[2:])
victim = psutil.Process(int(sys.argv[1]))
start, ran = now(), 0.0


def over(wait):
    left = start + seconds - now()
    return bool(select.select([0], [], [], max(0.0, min(wait, left, 1e6)))[0]) or now() >= start + seconds


try:
    victim.suspend()
    print("stopped", flush=True)
    while not over(ran / share - (now() - start) + (1 - share) * period if share else 1e6):
        victim.resume()
        resumed = now()
        done = over((share * (resumed - start) - ran) / (1 - share))
        if not done:
            victim.suspend()
        ran += now() - resumed
        if done:
            break
finally:
    victim.resume()
    with open(1, "w") as answer:
        answer.write(str(ran / (now() - start)))
"""


class Throttle:
    """A process of this machine that is stopped (SIGSTOP) and continued (SIGCONT) in turns, until `end`.

    Args:
        pid: of the process.
        share: of the time in which it may run; 0 stops it altogether.
        seconds: after which it runs freely again by itself.
        period: seconds between two stops.

    Raises:
        ProcessLookupError: there is no such process, or it may not be stopped.
    """

    def __init__(self, pid: int, share: float, seconds: float = math.inf, period: float = PERIOD):
        self.pid = pid
        self.achieved = math.nan
        """Share of the time in which the process could run, once that is over; nan if it is not known."""
        command = [sys.executable, "-c", _HOLD, *map(str, (pid, share, seconds, period))]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._holder.stdin
        assert self._holder.stdout
        self._stdin, self._stdout = self._holder.stdin, self._holder.stdout
        stopped = self._stdout.readline()
        self._watch = threading.Thread(target=self._wait, daemon=True)
        self._watch.start()
        if not stopped:
            self.end()
            raise ProcessLookupError(f"There is no process {pid} that may be stopped.")

    def end(self) -> float:
        """Let the process run freely and return the share achieved."""
        self._stdin.close()
        self._watch.join()
        self._holder.wait()
        return self.achieved

    def _wait(self) -> None:
        answer = self._stdout.read()
        self._stdout.close()
        if answer:
            self.achieved = float(answer)
        else:  # whoever stopped it was killed
            with suppress(OSError):
                os.kill(self.pid, signal.SIGCONT)


@contextmanager
def throttle_process(pid: int, share: float, period: float = PERIOD) -> Iterator[Throttle]:
    """Give a process of this machine ``share`` of its time inside the block; no Ray needed.

    The process is stopped before the block begins and runs freely after it. If this process dies meanwhile, even by
    SIGKILL, so does the throttle.

    Raises:
        UserError: the share is not between 0 and 1.
        ProcessLookupError: there is no such process, or it may not be stopped.
    """
    check_hold(share, period)
    throttle = Throttle(pid, share, period=period)
    try:
        yield throttle
    finally:
        throttle.end()


def check_hold(share: float, seconds: float) -> None:
    """Raises UserError where a process cannot be given ``share`` of its time for, or every, ``seconds``."""
    if not 0 <= share < 1:
        raise UserError(f"A share of a worker's time is at least 0 and below 1, not {share}.")
    if not seconds > 0:
        raise UserError(f"A worker is held for more than 0 seconds, not {seconds}.")
