"""Traces of a few training steps by torch's profiler."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from doge.common.storage import Storage

SKIPPED_STEPS = 3  # the first steps are slower than the rest; the last skipped one warms the profiler up


class StepTrace:
    """Traces a few of the next steps. A failure is reported through ``say`` and does not disturb the training.

    Args:
        first: Number of steps made so far.
        steps: Number of steps to trace; 0 traces nothing.
        folder: Directory for the trace.
        say: Is called with a sentence that says where the trace is, or why there is none.

    Attributes:
        written: Whether the trace is written.
    """

    def __init__(self, first: int, steps: int, folder: Storage, say: Callable[[str], None]):
        self._first, self._steps, self._folder, self._say = first + SKIPPED_STEPS, steps, folder, say
        self._made = 0
        self._profiler: torch.profiler.profile | None = None
        self.written = False

    def step(self) -> None:
        """Must be called after every step."""
        self._made += 1
        if not self._steps:
            return
        try:
            if self._made == SKIPPED_STEPS - 1:
                schedule = torch.profiler.schedule(wait=0, warmup=1, active=self._steps, repeat=1)
                self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, acc_events=True)
                self._profiler.start()
            elif self._profiler is not None:
                self._profiler.step()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Must be called after the last step. Traces of fewer steps than asked for are dropped."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            try:
                profiler.stop()
            except Exception as error:
                self._give_up(error)

    def _write(self, profiler: torch.profiler.profile) -> None:
        last = self._first + self._steps
        if self._made < SKIPPED_STEPS + self._steps:  # closed before the last step to trace
            return
        name = f"steps-{self._first + 1:08d}-{last:08d}.json.gz"
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, name)
            profiler.export_chrome_trace(str(path))
            self._folder.write_bytes(name, path.read_bytes())
        self.written = True
        place = self._folder.path(name)
        self._say(f"Steps {self._first + 1:,} to {last:,} are traced in {place}: see ui.perfetto.dev.")

    def _give_up(self, error: Exception) -> None:
        self._steps, self._profiler = 0, None
        self._say(f"The steps cannot be traced: {' '.join(str(error).split())[:160]}.")
