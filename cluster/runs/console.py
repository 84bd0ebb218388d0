"""Progress on the console: one live line on a terminal, plain periodic lines in a job's log."""

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TextIO

from doge.common.words import duration


class Console:
    """Prints a run's progress; a terminal's last line is overwritten, a log's never. Thread-safe.

    Args:
        max_steps: Last step of the run, for the time to go.
        logging_steps: Steps between two lines if the output is not a terminal.
    """

    def __init__(self, max_steps: int, logging_steps: int, output: TextIO | None = None):
        self._max_steps, self._logging_steps, self._output = max_steps, logging_steps, output or sys.stdout
        self._live = self._output.isatty()
        self._lock = threading.Lock()
        self._line = ""
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._clear()
            print(text, file=self._output, flush=True)
            self._draw()

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print labelled lines that stay."""
        rows = list(rows)
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            self.say(f"  {label:<{width}}  {text}")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the newest step: loss, rate, and time to go from the median of the last 50 steps."""
        now = time.monotonic()
        if self._last and step > self._last[0]:
            self._step_seconds.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        eta = "  -:--"
        if self._step_seconds:
            eta = duration(statistics.median(self._step_seconds) * (self._max_steps - step))
        text = (
            f"step {step:,}/{self._max_steps:,}  loss {metrics['loss']:.4f}  {metrics['tokens_per_s']:,.0f} tokens/s  "
            f"learning rate {metrics['learning_rate']:.2e}  {eta} to go"
        )
        if self._live:
            with self._lock:
                self._clear()
                self._line = text
                self._draw()
        elif step % self._logging_steps == 0 or step == self._max_steps:
            self.say(text)

    def close(self) -> None:
        """Leave the live line as it stands."""
        with self._lock:
            if self._line:
                print(file=self._output, flush=True)
                self._line = ""

    def _clear(self) -> None:
        if self._line:
            print("\r\x1b[2K", end="", file=self._output)

    def _draw(self) -> None:
        if self._line:
            print(self._line, end="", file=self._output, flush=True)
