"""Tracking in MLflow: a training run is one MLflow run, however often it is interrupted."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from doge.common.errors import UserError
from doge.common.storage import Storage

OPENING_SECONDS = 120.0  # to wait at most for other processes that open the same store

_RUN_FILE = "mlflow.json"


@dataclass(frozen=True)
class TrackingRecipe:
    experiment: str = "doge"
    """Name of the MLflow experiment."""
    uri: str | None = None
    """MLflow's tracking URI. Default: MLFLOW_TRACKING_URI if set, otherwise an SQLite file in the storage."""
    peak_tflops: float | None = None
    """Peak bf16 TFLOP/s of a worker's device, for MFU. Default: known for common GPUs, otherwise no MFU."""
    profile_steps: int = 0
    """Consecutive steps that the first worker traces for Perfetto, in the run's directory; --profile sets 3."""

    def __post_init__(self) -> None:
        if self.profile_steps < 0:
            raise UserError(f"tracking.profile_steps must not be negative, not {self.profile_steps}.")


class Tracker:
    """The MLflow run of a training run, created at the first start and continued at every later one.

    Every method but `finish` raises UserError if MLflow does not answer.

    Args:
        recipe: Where to track.
        storage: The storage's root, which holds the default SQLite file.
        run: The run's own directory, which stores the id of the MLflow run.
        name: Name of the run in MLflow.

    Attributes:
        uri: MLflow's tracking URI.
        run_id: Id of the MLflow run.
    """

    def __init__(self, recipe: TrackingRecipe, storage: Storage, run: Storage, name: str):
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        self.uri = recipe.uri or os.environ.get("MLFLOW_TRACKING_URI") or _default_uri(storage)
        self._logged: dict[str, int] = {}  # the newest step of each row's first metric
        with self._answering(), self._opening():
            self._client = MlflowClient(self.uri)
            self.run_id = self._continued(run) or self._created(recipe, storage, run, name)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet; MLflow refuses changes of the others."""
        from mlflow.entities import Param

        with self._answering():
            known = self._client.get_run(self.run_id).data.params
            new = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
            for start in range(0, len(new), 100):
                self._client.log_batch(self.run_id, params=new[start : start + 100])

    def log_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows of metrics, each with its ``step``; a row is left out if its first metric already has that step.

        After an interruption, training repeats the steps since its last checkpoint, with equal results.
        """
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics: list[Metric] = []
        logged: dict[str, int] = {}
        for row in rows:
            first = next(key for key in row if key != "step")
            if first not in self._logged:
                self._logged[first] = max((step for step, _ in self.history(first)), default=-1)
            if row["step"] <= logged.get(first, self._logged[first]):
                continue
            logged[first] = int(row["step"])
            metrics += [Metric(k, float(v), now, int(row["step"])) for k, v in row.items() if k != "step"]
        for start in range(0, len(metrics), 1000):
            with self._answering():
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        self._logged |= logged

    def history(self, metric: str) -> list[tuple[int, float]]:
        """All ``(step, value)`` pairs of a metric, ordered by step."""
        with self._answering():
            return sorted((m.step, m.value) for m in self._client.get_metric_history(self.run_id, metric))

    def log_artifact(self, path: str | Path) -> None:
        """Upload a local file."""
        with self._answering():
            self._client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """Set the status: ``FINISHED``, ``FAILED`` or ``KILLED``. A server that does not answer is ignored."""
        with suppress(UserError), self._answering():
            self._client.set_terminated(self.run_id, status)

    @property
    def show_command(self) -> str:
        """The command that shows the runs."""
        if self.uri.startswith("http"):
            return f"open {self.uri}"
        return f"mlflow ui --backend-store-uri {self.uri}"

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn MLflow's errors into UserErrors; every kind of store raises errors of its own."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"MLflow at {self.uri} does not answer ({reason}): check --tracking.uri.") from error

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Let one process of this machine at a time open an SQLite file: MLflow cannot create tables twice at once."""
        if not self.uri.startswith("sqlite:///"):
            yield
            return
        database = Path(self.uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{database}.lock", timeout=OPENING_SECONDS):
            yield

    def _continued(self, run: Storage) -> str | None:
        """Id of the MLflow run of an earlier start, if it is in this store."""
        from mlflow.exceptions import MlflowException

        try:
            run_id: str = json.loads(run.read_bytes(_RUN_FILE))["run_id"]
            self._client.update_run(run_id, status="RUNNING")
        except (FileNotFoundError, MlflowException):  # never tracked, or tracked elsewhere
            return None
        return run_id

    def _created(self, recipe: TrackingRecipe, storage: Storage, run: Storage, name: str) -> str:
        experiment = self._client.get_experiment_by_name(recipe.experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            artifacts = storage.path("mlflow-artifacts") if self.uri.startswith("sqlite:") else None
            experiment_id = self._client.create_experiment(recipe.experiment, artifact_location=artifacts)
        run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        run.write_bytes(_RUN_FILE, json.dumps({"run_id": run_id, "uri": self.uri}).encode())
        return run_id


def _default_uri(storage: Storage) -> str:
    if storage.is_local:
        return f"sqlite:///{storage.root}/mlflow.db"
    return f"sqlite:///{os.path.expanduser('~/doge/mlflow.db')}"
