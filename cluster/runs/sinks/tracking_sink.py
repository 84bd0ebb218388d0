"""MLflow as a sink: parameters, metrics, files and the status of the run."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.accounts.ledger import DriverStarted
from cluster.runs.journal import Entry
from cluster.runs.run_events import FileWritten, RunEnded
from cluster.runs.sinks.sink import Sink
from cluster.workloads.training_events import MetricsMeasured
from doge.common.storage import Storage
from doge.reporting.tracking import MetricRow, Tracker


class TrackingSink(Sink):
    """Opens MLflow when the first event is there, and hands it what it shows.

    Args:
        open_tracker: opens the run in MLflow; may raise and may hang.
        directory: the run's, where the files lie.
    """

    name = "MLflow"

    def __init__(self, open_tracker: Callable[[], Tracker], directory: Storage):
        self._open_tracker, self._directory = open_tracker, directory
        self._tracker: Tracker | None = None

    def handle(self, entries: Sequence[Entry]) -> None:
        """Raises UserError where MLflow does not answer, or StorageError."""
        self._tracker = tracker = self._tracker or self._open_tracker()
        rows: list[MetricRow] = []
        for entry in entries:
            match entry.event:
                case MetricsMeasured(step=step, metrics=metrics):
                    rows.append(MetricRow(step, metrics, entry.time))
                case DriverStarted(parameters=parameters):
                    tracker.resume()
                    tracker.log_params(parameters)
                case FileWritten(name=name):
                    self._log_file(tracker, name)
                case RunEnded(status=status):
                    tracker.log_metrics(rows)
                    rows = []
                    tracker.finish(status)
        tracker.log_metrics(rows)

    def _log_file(self, tracker: Tracker, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(self._directory.read_bytes(name))
            tracker.log_artifact(path)
