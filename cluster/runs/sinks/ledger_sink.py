"""The ledger as a sink: where every second of every worker went, kept in the run's directory."""

import tempfile
from pathlib import Path
from typing import Any

from cluster.accounts.figures import Figures
from cluster.accounts.ledger import Ledger, LedgerRecipe
from cluster.elastic.events import Event
from cluster.runs.sinks.sink import StateSink
from doge.common.storage import Storage

TIMELINE = "timeline.png"


class LedgerSink(StateSink):
    """Keeps ``ledger.json`` in the run's directory; every driver of the run continues it.

    Args:
        directory: The run's directory.
        prices: Prices for the figures.
        tokens_per_step: Tokens of a global batch; a ledger with another number is started anew.
        tokens_per_unit: Tokens of a sequence.
    """

    name = "ledger"

    def __init__(self, directory: Storage, prices: LedgerRecipe, tokens_per_step: int, tokens_per_unit: int):
        super().__init__(directory, "ledger.json")
        self._prices = prices
        self._ledger = Ledger(tokens_per_step, tokens_per_unit)

    def take(self, event: Event) -> None:
        self._ledger.take(event)

    def to_dict(self) -> dict[str, Any]:
        return self._ledger.to_dict()

    def restore(self, values: dict[str, Any]) -> None:
        ledger = Ledger.from_dict(values)
        if ledger.tokens_per_step == self._ledger.tokens_per_step:
            self._ledger = ledger

    def figures(self) -> Figures:
        """The figures of all events so far."""
        with self.lock:
            return self._ledger.figures(self._prices)

    def draw_timeline(self, title: str) -> str:
        """Write the run's timeline as a PNG into its directory. Returns the file's name; raises StorageError."""
        from doge.reporting.plots import plot_lanes

        with self.lock:
            timeline = self._ledger.timeline()
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder, TIMELINE)
            plot_lanes(plot, title, **timeline.drawing())
            self._directory.write_bytes(TIMELINE, plot.read_bytes())
        return TIMELINE


def measured_speeds(figures: Figures) -> dict[str, float]:
    """Tokens a second that a worker on each kind of device made while it computed."""
    speeds = {}
    for device in {worker.device for worker in figures.workers}:
        workers = [worker for worker in figures.workers if worker.device == device]
        seconds = sum(worker.seconds_of.get("step", 0.0) for worker in workers)
        if seconds > 0:
            speeds[device] = sum(worker.tokens for worker in workers) / seconds
    return speeds
