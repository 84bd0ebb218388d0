"""MLflow's store is locked, hangs or is gone: steps and commits go on, and afterwards nothing is missing there."""

import io
import json
import os
import shutil
import socket
import sqlite3
import threading
import time
from contextlib import contextmanager

import pytest
from recorded_runs import driving, make_steps, recorded_run, tracked

from cluster.runs import run as run_module
from cluster.runs.sinks import delivery
from cluster.runs.sinks.tracking_sink import TrackingSink
from doge.common.errors import UserError

pytestmark = pytest.mark.slow

COMMIT_SECONDS = 8.0  # a commit waits for the journal alone; a locked store answers after 20 s, a silent one never
LOSSES = [(step, 1 / step) for step in range(1, 61)]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to make."""
    from mlflow.tracking import MlflowClient

    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, empty_store):
    for name in ("mlflow.db", "served.db"):
        shutil.copy(empty_store, tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(delivery, "LAST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(run_module, "OPENING_SECONDS", 30.0)  # MLflow's import alone takes seconds on a busy machine


@contextmanager
def locked(database):
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextmanager
def silent(port: int):
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", port), backlog=100):
        yield


@contextmanager
def server(port: int, root):
    """A real tracking server in a thread of this process."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    handlers.initialize_backend_stores(f"sqlite:///{root}/served.db", default_artifact_root=str(root / "artifacts"))
    serving = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def everything_is_there(root, uri=None) -> None:
    assert tracked(root, uri) == LOSSES
    assert [step for step, _ in tracked(root, uri, "held_out_loss")] == [10, 20, 30, 40, 50, 60]
    assert len(os.listdir(root / "runs/small/samples")) == 60
    ledger = json.loads((root / "runs/small/ledger.json").read_text())
    assert ledger["memberships"][-1]["finished"]["step"] == 60


def test_a_store_that_is_locked(tmp_path):
    output = io.StringIO()
    run = recorded_run(tmp_path, output)
    with driving(run) as board:
        make_steps(board, range(1, 21))
        with locked(tmp_path / "mlflow.db"):
            assert make_steps(board, range(21, 61), seconds=0.02) < COMMIT_SECONDS
    everything_is_there(tmp_path)
    assert "step 60/1,000" in output.getvalue()


def test_a_store_that_is_locked_when_the_run_starts(tmp_path, monkeypatch):
    with driving(recorded_run(tmp_path)) as board:
        make_steps(board, range(1, 11))
    monkeypatch.setattr(run_module, "OPENING_SECONDS", 0.5)
    output = io.StringIO()
    began = time.monotonic()
    with locked(tmp_path / "mlflow.db"):
        context = driving(recorded_run(tmp_path, output))
        board = context.__enter__()
        assert time.monotonic() - began < 12.0
        assert make_steps(board, range(11, 61)) < COMMIT_SECONDS
    context.__exit__(None, None, None)
    everything_is_there(tmp_path)
    assert "MLflow cannot be written now" in output.getvalue()
    assert "MLflow can be written again." in output.getvalue()


def test_a_server_that_hangs_and_one_that_refuses(tmp_path, port):
    uri, output = f"http://127.0.0.1:{port}", io.StringIO()
    with server(port, tmp_path):
        context = driving(recorded_run(tmp_path, output, uri))
        board = context.__enter__()
        make_steps(board, range(1, 11))
    with silent(port):
        assert make_steps(board, range(11, 41), seconds=0.05) < COMMIT_SECONDS
    assert make_steps(board, range(41, 61), seconds=0.05) < COMMIT_SECONDS  # connections are refused
    with server(port, tmp_path):
        context.__exit__(None, None, None)
        everything_is_there(tmp_path, uri)
    assert output.getvalue().count("MLflow cannot be written now, nothing waits for it") == 1


def test_a_database_that_is_taken_away_and_brought_back(tmp_path):
    database = tmp_path / "mlflow.db"
    with driving(recorded_run(tmp_path)) as board:
        make_steps(board, range(1, 21))
        database.rename(tmp_path / "aside.db")
        assert make_steps(board, range(21, 61), seconds=0.02) < COMMIT_SECONDS
        time.sleep(1.0)
        assert not database.exists()
        (tmp_path / "aside.db").rename(database)
    everything_is_there(tmp_path)


def test_a_server_that_never_answers_is_caught_up_with_by_the_next_call(tmp_path, port, monkeypatch):
    monkeypatch.setattr(run_module, "OPENING_SECONDS", 0.5)
    monkeypatch.setattr(TrackingSink, "close_seconds", 1.0)
    uri, output = f"http://127.0.0.1:{port}", io.StringIO()
    began = time.monotonic()
    with silent(port), driving(recorded_run(tmp_path, output, uri)) as board:
        make_steps(board, range(1, 61))
    assert time.monotonic() - began < 25
    assert "MLflow has not got the last" in output.getvalue()
    assert "run the same command again to deliver them" in output.getvalue()
    monkeypatch.setattr(TrackingSink, "close_seconds", 60.0)
    again = io.StringIO()
    with server(port, tmp_path):
        recorded_run(tmp_path, again, uri).deliver_rest()
        everything_is_there(tmp_path, uri)
        assert "has not got" not in again.getvalue()
        again.truncate(0)
        recorded_run(tmp_path, again, uri).deliver_rest()
        assert again.getvalue() == ""


def test_a_driver_that_was_killed_has_left_the_rest_to_the_next(tmp_path):
    """What was journaled and never delivered: the first driver's threads die with it."""
    run = recorded_run(tmp_path)
    first = driving(run)
    board = first.__enter__()
    make_steps(board, range(1, 11))
    for thread in run._delivery._threads:
        thread.give_up()  # as far as it has got
    make_steps(board, range(11, 31))
    (tmp_path / "runs/small/lease.json").unlink()
    with driving(recorded_run(tmp_path)) as board:
        make_steps(board, range(26, 61))
    first.__exit__(None, None, None)  # one that was only suspended damages nothing when it wakes up
    everything_is_there(tmp_path)


def test_a_store_that_cannot_be_used_is_said_before_the_run_starts(tmp_path, port):
    with (
        pytest.raises(UserError, match=r"does not answer .*check --tracking\.uri"),
        driving(recorded_run(tmp_path, uri=f"http://127.0.0.1:{port}")),
    ):
        raise AssertionError("it must not start")
