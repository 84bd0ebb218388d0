"""The hand of chaos on a node."""

import os
import signal
from contextlib import suppress

import psutil

from cluster.chaos.throttle import Throttle


class Agent:
    """The actor's class: sends the signals on one node. It dies with its owner, and then nothing stays stopped."""

    def __init__(self):
        self._holds: dict[int, Throttle] = {}

    def kill(self, pid: int) -> bool:
        """SIGKILL a worker; False if it is gone."""
        if worker := self._worker(pid):
            worker.kill()
        return worker is not None

    def hold(self, pid: int, share: float, seconds: float) -> bool:
        """Give a worker ``share`` of its time for ``seconds``, in place of an earlier hold; False if it is gone."""
        if pid in self._holds:
            self._holds.pop(pid).end()
        if self._worker(pid) is None:
            return False
        with suppress(ProcessLookupError):
            self._holds[pid] = Throttle(pid, share, seconds)
        return pid in self._holds

    def release(self) -> None:
        """Let all workers run freely."""
        while self._holds:
            self._holds.popitem()[1].end()

    def has_raylet(self) -> bool:
        """Whether there is a raylet to kill."""
        return self._raylet() is not None

    def kill_node(self) -> None:
        """SIGKILL the raylet and all its processes, as if the machine lost its power; this one too: no answer comes."""
        raylet, here = self._raylet(), os.getpid()
        assert raylet, "this process has no raylet above it"
        children = [child for child in raylet.children(recursive=True) if child.pid != here]
        for process in [raylet, *children]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(here, signal.SIGKILL)

    def _raylet(self) -> psutil.Process | None:
        return next((parent for parent in psutil.Process().parents() if parent.name() == "raylet"), None)

    def _worker(self, pid: int) -> psutil.Process | None:
        """The process, if it still is a host."""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if any("ray::Host" in part for part in process.cmdline()):
                return process
        return None
