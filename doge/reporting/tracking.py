"""MLflow: one run of ours is one run there, however often it was interrupted."""

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

OPENING_SECONDS = 120.0  # at most, for other processes that open the same store

_RUN_FILE = "mlflow.json"


@dataclass(frozen=True)
class TrackingRecipe:
    experiment: str = "doge"
    uri: str | None = None
    """MLflow's tracking URI; MLFLOW_TRACKING_URI if that is set, else an SQLite file under the storage root."""
    peak_tflops: float | None = None
    """A worker's peak in bf16, for MFU; known by itself for common GPUs."""
    profile_steps: int = 0
    """Steps in a row of which the first worker writes a trace for Perfetto, beside the run; --profile sets 3."""

    def __post_init__(self):
        if self.profile_steps < 0:
            raise UserError(f"tracking.profile_steps must not be negative, not {self.profile_steps}.")


class Tracker:
    """The MLflow run of a training run, created at the first start and continued at every later one.

    Args:
        recipe: where to track.
        storage: the root, which holds the default SQLite file.
        run: the run's own directory, which remembers the MLflow run.
        name: what MLflow shows.
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
        """Log what the run does not know yet; MLflow refuses changes of what it does."""
        from mlflow.entities import Param

        with self._answering():
            known = self._client.get_run(self.run_id).data.params
            new = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
            for start in range(0, len(new), 100):
                self._client.log_batch(self.run_id, params=new[start : start + 100])

    def log_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows that each hold ``step``; a row whose first metric that step already has is left out.

        Training repeats the steps since its last checkpoint after an interruption, with equal results.
        """
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics, logged = [], {}
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
        """All ``(step, value)`` of a metric in the order of steps."""
        with self._answering():
            return sorted((m.step, m.value) for m in self._client.get_metric_history(self.run_id, metric))

    def log_artifact(self, path: str | Path) -> None:
        with self._answering():
            self._client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """``FINISHED``, ``FAILED`` or ``KILLED``; a server that has gone away is not worth an error any more."""
        with suppress(UserError), self._answering():
            self._client.set_terminated(self.run_id, status)

    @property
    def show_command(self) -> str:
        """What a user types to look at the runs."""
        if self.uri.startswith("http"):
            return f"open {self.uri}"
        return f"mlflow ui --backend-store-uri {self.uri}"

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn MLflow's errors into one sentence; every kind of store raises its own."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"MLflow at {self.uri} does not answer ({reason}): check --tracking.uri.") from error

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """One process of this machine at a time: MLflow does not make the tables of an SQLite file twice at once."""
        if not self.uri.startswith("sqlite:///"):
            yield
            return
        database = Path(self.uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{database}.lock", timeout=OPENING_SECONDS):
            yield

    def _continued(self, run: Storage) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            remembered = json.loads(run.read_bytes(_RUN_FILE))
            self._client.update_run(remembered["run_id"], status="RUNNING")
        except (FileNotFoundError, MlflowException):  # never tracked, or tracked elsewhere
            return None
        return remembered["run_id"]

    def _created(self, recipe: TrackingRecipe, storage: Storage, run: Storage, name: str) -> str:
        experiment = self._client.get_experiment_by_name(recipe.experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            artifacts = storage.path("mlflow-artifacts") if self.uri.startswith("sqlite:") else None
            experiment_id = self._client.create_experiment(recipe.experiment, artifact_location=artifacts)
        run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        run.write_bytes(_RUN_FILE, json.dumps({"run_id": run_id, "uri": self.uri}).encode())
        return run_id


def _default_uri(storage: Storage) -> str:
    if storage.is_local:
        return f"sqlite:///{storage.root}/mlflow.db"
    return f"sqlite:///{os.path.expanduser('~/doge/mlflow.db')}"
