"""Tracking in MLflow: a training run is one MLflow run, however often it is interrupted.

A store may be locked, hang or be gone: every call may then fail or take long, and may be repeated without harm.
"""

import json
import os
import re
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import filelock

from doge.common.errors import UserError
from doge.common.paths import is_uri, plain_path
from doge.common.redaction import without_secrets
from doge.common.storage import Storage

OPENING_SECONDS = 120.0  # to wait at most for other processes that open the same store
LOCK_SECONDS = 20.0  # for a database that another process writes
REQUEST_SECONDS = 30  # for one answer of a tracking server
METRICS_PER_REQUEST = 1000  # MLflow's limit

_RUN_FILE = "mlflow.json"
_DATABASE, _ARTIFACTS = "mlflow.db", "mlflow-artifacts"  # in a storage
_SQLITE = "sqlite:///"
_PARAMETER_SYMBOLS = re.compile(r"[^\w.\- :]")  # that MLflow does not take in a name
_STATUS = re.compile(r"(?:failed with error code|too many) (\d{3})\b")
_REASON = re.compile(r"\[Errno -?\d+\] ([^'\")]+)|certificate verify failed")
_NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "NOT_FOUND")


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
        if not self.experiment.strip():
            raise UserError("tracking.experiment is empty: give the experiment a name.")

    @property
    def given_uri(self) -> str | None:
        """The tracking URI that the recipe or the environment names; None for the storage's own store."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or None

    def check(self) -> None:
        """Raise UserError where the tracking URI is something else, such as a directory."""
        uri = self.given_uri
        if uri is None or uri.startswith("databricks") or is_uri(uri):
            return
        if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
            raise UserError(f"tracking.uri = {uri} names a server without its protocol: write http://{uri}.")
        path = os.path.abspath(plain_path(uri))
        raise UserError(
            f"tracking.uri = {uri} names a directory, and MLflow keeps its runs in a database or on a server: give "
            f"{sqlite_uri(f'{path}/mlflow.db')}, or http://HOST:PORT."
        )


class TrackingBusy(UserError):
    """The tracking store is locked or has not answered in time; later it may."""


@dataclass(frozen=True)
class MetricRow:
    """Metrics that were measured together.

    Args:
        metrics: the first name tells which rows are of one kind; a step has one row of a kind.
        time: when, in seconds since 1970.
    """

    step: int
    metrics: Mapping[str, float]
    time: float


class Tracker:
    """The MLflow run of a training run, created at the first start and continued at every later one.

    Every method raises UserError if MLflow does not answer, TrackingBusy if that may pass by itself.

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
        # What goes wrong is said in a sentence of our own, after which the caller tries again.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        self.uri = tracking_uri(recipe, storage)
        if database_path(self.uri) is not None:  # a pooled connection would go on writing to a file that was replaced
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        from mlflow.tracking import MlflowClient

        self._logged: dict[str, int] = {}  # the newest step of each row's first metric
        self._database = database_path(self.uri)
        self._opened = False
        with self._answering(), self._opening():
            self._client = MlflowClient(self.uri)
            self.run_id = self._continued(run) or self._created(recipe, storage, run, name)
            if self._database is not None:
                self._place_artifacts(self._database, storage)
        self._opened = True

    def resume(self) -> None:
        """Set the status to ``RUNNING``."""
        with self._answering():
            self._client.update_run(self.run_id, status="RUNNING")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet; MLflow refuses changes of the others."""
        from mlflow.entities import Param

        with self._answering():
            known = self._client.get_run(self.run_id).data.params
            named = {_PARAMETER_SYMBOLS.sub("_", key): str(value)[:6000] for key, value in params.items()}
            new = [Param(key, value) for key, value in named.items() if key not in known]
            for start in range(0, len(new), 100):
                self._client.log_batch(self.run_id, params=new[start : start + 100])

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        """Log rows of metrics; a row is left out if its first metric already has that step or a later one.

        After an interruption, training repeats the steps since its last checkpoint, with equal results.
        """
        new: list[MetricRow] = []
        logged: dict[str, int] = {}
        for row in rows:
            first = next(iter(row.metrics))
            if first not in self._logged:
                self._logged[first] = max((step for step, _ in self.history(first)), default=-1)
            if row.step > logged.get(first, self._logged[first]):
                logged[first] = row.step
                new.append(row)
        for batch in _batches(new):
            try:
                self._log_batch(batch)
            except UserError:
                self._logged.clear()  # what has arrived all the same, its history tells
                raise
            self._logged |= {next(iter(row.metrics)): row.step for row in batch}

    def _log_batch(self, rows: Sequence[MetricRow]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(row.time * 1000), row.step)
            for row in rows
            for name, value in row.metrics.items()
        ]
        with self._answering():
            self._client.log_batch(self.run_id, metrics=metrics)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """All ``(step, value)`` pairs of a metric, ordered by step."""
        with self._answering():
            return sorted((m.step, m.value) for m in self._client.get_metric_history(self.run_id, metric))

    def log_artifact(self, path: str | Path) -> None:
        """Upload a local file."""
        with self._answering():
            self._client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """Set the status: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self._answering():
            self._client.set_terminated(self.run_id, status)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn MLflow's errors into UserErrors; every kind of store raises errors of its own."""
        try:
            if self._opened and self._database is not None and not os.path.exists(self._database):
                raise UserError(
                    f"MLflow's database {self.uri} is gone: bring it back."
                )  # not an empty one in its place
            yield
        except UserError:
            raise
        except Exception as error:
            raise _in_a_sentence(error, self.uri) from error

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Let one process of this machine at a time open an SQLite file: MLflow cannot create tables twice at once."""
        if self._database is None:
            yield
            return
        database, misread = Path(self._database), Path(self.uri.removeprefix(_SQLITE)).parent
        database.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{database}.lock", timeout=OPENING_SECONDS):
            known = misread.exists()
            yield
        if not known:  # MLflow makes the directory that the URI would name without its escapes
            with suppress(OSError):
                os.removedirs(misread)

    def _continued(self, run: Storage) -> str | None:
        """Id of the MLflow run of an earlier start, if it is in this store."""
        from mlflow.exceptions import MlflowException

        try:
            remembered = json.loads(run.read_bytes(_RUN_FILE))
            self._client.update_run(remembered["run_id"], status="RUNNING")
        except (FileNotFoundError, ValueError, KeyError):  # never tracked, or the note is damaged
            return None
        except MlflowException as error:
            if error.error_code in _NO_SUCH_RUN:  # tracked elsewhere
                return None
            raise
        return str(remembered["run_id"])

    def _created(self, recipe: TrackingRecipe, storage: Storage, run: Storage, name: str) -> str:
        experiment = self._client.get_experiment_by_name(recipe.experiment)
        if experiment is None:
            artifacts = _artifacts(storage) if self._database is not None else None
            experiment_id = self._client.create_experiment(recipe.experiment, artifact_location=artifacts)
        elif experiment.lifecycle_stage == "deleted":
            raise UserError(
                f"The MLflow experiment {recipe.experiment!r} at {self.uri} was deleted: restore it with `mlflow "
                f"experiments restore --experiment-id {experiment.experiment_id}` and MLFLOW_TRACKING_URI={self.uri}, "
                "or set --tracking.experiment to another name."
            )
        else:
            experiment_id = experiment.experiment_id
        run_id = str(self._client.create_run(experiment_id, run_name=name).info.run_id)
        run.write_bytes(_RUN_FILE, json.dumps({"run_id": run_id, "uri": without_secrets(self.uri)}).encode())
        return run_id

    def _place_artifacts(self, database: str, storage: Storage) -> None:
        """Let this run's files lie in its storage, wherever that is by now.

        MLflow notes absolute places in its database, and has no call to change them. Where the database is the
        storage's own, what it says of all other runs follows too.
        """
        own = os.path.abspath(database) == storage.path(_DATABASE)
        values = {"root": _artifacts(storage), "run": self.run_id, "own": own}
        with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection, connection:
            connection.execute(
                "UPDATE runs SET artifact_uri = :root || '/' || run_uuid || '/artifacts'"
                f" WHERE (:own OR run_uuid = :run) AND artifact_uri LIKE '%/{_ARTIFACTS}/' || run_uuid || '/artifacts'",
                values,
            )
            connection.execute(
                "UPDATE experiments SET artifact_location = :root"
                f" WHERE :own AND artifact_location LIKE '%/{_ARTIFACTS}'",
                values,
            )


def _artifacts(storage: Storage) -> str:
    """The URI of the directory for the files of a storage's runs; of a path MLflow would decode what is no escape."""
    path = storage.path(_ARTIFACTS)
    return Path(path).as_uri() if storage.is_local else path


def tracking_uri(recipe: TrackingRecipe, storage: Storage) -> str:
    """The tracking URI of a run; see `TrackingRecipe.uri`."""
    uri = recipe.given_uri
    if uri is None:
        return sqlite_uri(storage.path(_DATABASE) if storage.is_local else os.path.expanduser(f"~/doge/{_DATABASE}"))
    path = database_path(uri)
    return uri if path is None or "?" in uri else sqlite_uri(os.path.abspath(plain_path(path)))


def sqlite_uri(path: str) -> str:
    """The tracking URI of an SQLite file; all but these two letters stand for themselves there."""
    return _SQLITE + path.replace("%", "%25").replace("?", "%3F")


def database_path(uri: str) -> str | None:
    """The path of the SQLite file that a tracking URI names; None for a server or another database."""
    return unquote(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def show_command(uri: str) -> str:
    """The command that shows the runs that are tracked at a URI."""
    return without_secrets(
        f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    )


def _in_a_sentence(error: Exception, uri: str) -> UserError:
    """What an error of MLflow means; each kind of store has errors of its own."""
    from mlflow.exceptions import RestException

    text = " ".join(str(error).split())
    found = _REASON.search(text)
    reason, where = (found[1] or found[0]) if found else text[:200], f"MLflow at {uri}"
    if any(word in text for word in ("locked", "file lock", "timed out", "timeout")):
        return TrackingBusy(f"{where} does not answer now ({reason}).")
    if not uri.startswith("http"):
        return UserError(f"{where} cannot be used ({reason}): check --tracking.uri.")
    status = _STATUS.search(text)
    code = error.get_http_status_code() if isinstance(error, RestException) else int(status[1]) if status else None
    if code is None:
        return UserError(f"{where} does not answer ({reason}): start the server, or check --tracking.uri.")
    if code in (401, 403):
        return UserError(
            f"{where} refuses access ({code}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, to what may write there."
        )
    if code in (404, 405):
        return UserError(f"{where} is no tracking server, since it answers {code}: check --tracking.uri.")
    return UserError(f"{where} answers with an error ({code}: {reason}): see the server's log.")


def _batches(rows: Sequence[MetricRow]) -> Iterator[list[MetricRow]]:
    """Rows in requests that MLflow takes; a row is never divided, since it is known by its first metric alone."""
    batch: list[MetricRow] = []
    for row in rows:
        if batch and sum(len(other.metrics) for other in batch) + len(row.metrics) > METRICS_PER_REQUEST:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
