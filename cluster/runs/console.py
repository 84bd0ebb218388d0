"""Progress on the console: one live line on a terminal, plain periodic lines in a job's log."""

import os
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from doge.common.redaction import without_secrets
from doge.common.terminal import printable
from doge.common.words import duration

LOG_SECONDS = 10.0  # between two lines of a log that say how far something has got


class Console:
    """Prints a run's progress; a terminal's last line is overwritten, a log's never. Thread-safe.

    It never raises: an output that is closed, full or gone is no reason to end a run. Passwords and tokens in URIs are
    left out.

    Args:
        max_steps: Last step of the run, for the time to go.
        logging_steps: Steps between two lines if the output is not a terminal.
    """

    def __init__(self, max_steps: int, logging_steps: int, output: TextIO | None = None):
        self._max_steps, self._logging_steps, self._output = max_steps, logging_steps, output or sys.stdout
        self._live = self._output.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._lock = threading.Lock()
        self._line = ""
        self._logged = time.monotonic()  # when a log was last told how far something has got
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._clear()
            self._print(text, "\n")
            self._draw()

    def progress(self, text: str) -> None:
        """Show how far something has got: on the live line, or now and then in a log."""
        if self._live:
            self._show(text)
        elif time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            self.say(text)

    def conclude(self, text: str) -> None:
        """Print a line that stays in place of the live line."""
        with self._lock:
            self._clear()
            self._line = ""
        self.say(text)

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
            self._show(text)
        elif step % self._logging_steps == 0 or step == self._max_steps:
            self.say(text)

    def close(self) -> None:
        """Leave the live line as it stands."""
        with self._lock:
            if self._line:
                self._print("", "\n")
                self._line = ""

    def _show(self, line: str) -> None:
        width = shutil.get_terminal_size((0, 0)).columns
        with self._lock:
            self._clear()
            self._line = line[: width - 1] if width > 1 else line  # only one row can be overwritten
            self._draw()

    def _clear(self) -> None:
        if self._line:
            self._print("\r\x1b[2K")

    def _draw(self) -> None:
        if self._line:
            self._print(self._line)

    def _print(self, text: str, end: str = "") -> None:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            print(printable(without_secrets(text), self._output.encoding), end=end, file=self._output, flush=True)
