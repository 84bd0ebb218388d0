"""A trace of a few steps, by torch's profiler."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from doge.storage import Storage

SKIPPED_STEPS = 2  # at first, which are slower than the rest; one more wakes the profiler up


class StepTrace:
    """Traces a few of the steps to come, and writes the trace once.

    Args:
        first: number of the next step.
        steps: to be traced; 0 traces nothing.
        folder: where the trace goes.
        say: is told where it lies.
    """

    def __init__(self, first: int, steps: int, folder: Storage, say: Callable[[str], None]):
        self._first, self._steps, self._folder, self._say = first + SKIPPED_STEPS + 1, steps, folder, say
        self._profiler: torch.profiler.profile | None = None
        if steps:
            schedule = torch.profiler.schedule(wait=SKIPPED_STEPS, warmup=1, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, acc_events=True)
            self._profiler.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """No further step comes."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        last = self._first + self._steps
        name = f"steps-{self._first + 1:08d}-{last:08d}.json.gz"
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, name)
            profiler.export_chrome_trace(str(path))
            self._folder.write_bytes(name, path.read_bytes())
        self._say(
            f"Steps {self._first + 1:,} to {last:,} are traced in {self._folder.path(name)}: see ui.perfetto.dev."
        )
