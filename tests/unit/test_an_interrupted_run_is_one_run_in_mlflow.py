import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from filelock import FileLock

from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.reporting import tracking
from doge.reporting.tracking import MetricRow, Tracker, TrackingRecipe


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store whose tables are made, which takes seconds."""
    root = Storage(str(tmp_path_factory.mktemp("empty")))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = Tracker(TrackingRecipe(experiment="none"), root, root / "runs/none", "none")
    tracker.finish("FINISHED")
    return tracking.database_path(tracker.uri)


@pytest.fixture
def track(empty_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path)
    root = Storage(str(tmp_path))
    return lambda **recipe: Tracker(TrackingRecipe(**recipe), root, root / "runs/small", "small")


def row(step: int, **metrics: float) -> MetricRow:
    return MetricRow(step, metrics, 1.7e9 + step)


def test_a_resumed_run_goes_on_in_the_same_run_without_repeating_a_step(track):
    first = track()
    first.log_params({"optimizer.lr": 0.1, "model.preset": "Doge-20M"})
    first.log_metrics([row(step, loss=1 / step, learning_rate=0.1) for step in range(1, 21)])
    first.finish("FAILED")

    again = track()
    assert again.run_id == first.run_id
    again.log_params({"optimizer.lr": 0.1, "scaling.num_workers": 2})
    again.log_metrics([row(step, loss=1 / step, learning_rate=0.1) for step in range(11, 31)])
    again.log_metrics([row(30, held_out_loss=2.0), row(30, loss=9.0)])
    assert again.history("loss") == [(step, 1 / step) for step in range(1, 31)]
    assert again.history("learning_rate") == [(step, 0.1) for step in range(1, 31)]
    assert again.history("held_out_loss") == [(30, 2.0)]
    again.finish("FINISHED")

    from mlflow.tracking import MlflowClient

    run = MlflowClient(again.uri).get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.1", "model.preset": "Doge-20M", "scaling.num_workers": "2"}


def test_a_store_that_another_process_opens_is_waited_for(track, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = track()
    monkeypatch.setattr(tracking, "OPENING_SECONDS", 0.1)
    with FileLock(f"{tracker.uri.removeprefix('sqlite:///')}.lock"), pytest.raises(UserError, match="lock"):
        track()
    assert track().run_id == tracker.run_id


@pytest.mark.slow
def test_runs_that_start_at_once_share_a_new_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    start = (
        "import sys; from doge.common.storage import Storage\n"
        "from doge.reporting.tracking import Tracker, TrackingRecipe\n"
        "root, name = Storage(sys.argv[1]), sys.argv[2]\n"
        "print(Tracker(TrackingRecipe(), root, root / f'runs/{name}', name).run_id)"
    )
    commands = [[sys.executable, "-c", start, tmp_path, name] for name in ("one", "two")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert told[0][0] != told[1][0]


def test_artifacts_lie_beside_the_runs(track, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"png")
    track().log_artifact(tmp_path / "loss.png")
    assert len(list((tmp_path / "mlflow-artifacts").rglob("loss.png"))) == 1


@pytest.mark.parametrize("name", ["two words", "no#1", "100%25", "50%", "what?", "é"])
def test_a_store_lies_in_a_directory_of_any_name(name, empty_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    shutil.copy(empty_store, tmp_path / name / "mlflow.db")
    root = Storage(str(tmp_path / name))
    tracker = Tracker(TrackingRecipe(), root, root / "runs/small", "small")
    tracker.log_artifact(__file__)
    assert len(list((tmp_path / name / "mlflow-artifacts").rglob("*.py"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert shlex.split(tracking.show_command(tracker.uri))[-1] == tracker.uri


def test_artifacts_follow_a_storage_that_is_moved(empty_store, tmp_path, monkeypatch):
    """Those of this run, of the others and of those to come; nothing is written to the old place."""
    from mlflow.tracking import MlflowClient
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "old").mkdir()
    shutil.copy(empty_store, tmp_path / "old/mlflow.db")
    (tmp_path / "loss.png").write_bytes(b"png")
    old = Storage(str(tmp_path / "old"))
    runs = [Tracker(TrackingRecipe(), old, old / f"runs/{name}", name) for name in ("one", "two")]
    for tracker in runs:
        tracker.log_artifact(tmp_path / "loss.png")
    elsewhere = runs[0]._client.create_experiment("mine", artifact_location=str(tmp_path / "mine"))
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "old").write_text("")  # cannot be made again
    _artifact_repos_cache.clear()  # as in another process

    new = Storage(str(tmp_path / "new"))
    again = Tracker(TrackingRecipe(), new, new / "runs/one", "one")
    assert again.run_id == runs[0].run_id
    again.log_artifact(__file__)
    client = MlflowClient(again.uri)
    assert {item.path for item in client.list_artifacts(again.run_id)} == {"loss.png", __file__.rsplit("/", 1)[-1]}
    assert [item.path for item in client.list_artifacts(runs[1].run_id)] == ["loss.png"]
    third = Tracker(TrackingRecipe(), new, new / "runs/three", "three")
    third.log_artifact(tmp_path / "loss.png")
    assert len(list((tmp_path / "new/mlflow-artifacts").rglob("loss.png"))) == 3
    assert client.get_experiment(elsewhere).artifact_location == str(tmp_path / "mine")


def test_a_shared_store_keeps_each_runs_files_in_its_own_storage(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "shared.db")
    recipe = TrackingRecipe(uri=f"sqlite:///{tmp_path}/shared.db")
    for name in ("first", "second"):
        root = Storage(str(tmp_path / name))
        Tracker(recipe, root, root / "runs/small", "small").log_artifact(__file__)
        assert len(list((tmp_path / name / "mlflow-artifacts").rglob("*.py"))) == 1


def test_an_experiment_that_was_deleted_is_said_to_be(track):
    first = track(experiment="mine")
    number = first._client.get_experiment_by_name("mine").experiment_id
    first._client.delete_experiment(number)
    told = rf"'mine' .* was deleted: restore it with .*--experiment-id {number}.*or set --tracking\.experiment"
    with pytest.raises(UserError, match=told):
        track(experiment="mine")
    first._client.restore_experiment(number)
    assert track(experiment="mine").run_id == first.run_id


def test_parameters_of_any_name_are_tracked(track):
    tracker = track()
    tracker.log_params({"data.sources.wiki#de (2).path": "a", "data.sources.日本/x.path": "b"})
    tracker.log_params({"data.sources.wiki#de (2).path": "a"})
    params = tracker._client.get_run(tracker.run_id).data.params
    assert params == {"data.sources.wiki_de _2_.path": "a", "data.sources.日本_x.path": "b"}


class Answers(BaseHTTPRequestHandler):
    """A server that answers every request alike."""

    code, body = 500, b""

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("code", "body", "sentence"),
    [
        (401, b"<html>who are you? hush</html>", r"refuses access \(401\): set MLFLOW_TRACKING_USERNAME and"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', r"refuses access \(403\): set MLFLOW"),
        (404, b"<html>not here</html>", r"is no tracking server, since it answers 404: check --tracking\.uri"),
        (500, b"<html>oh</html>", r"answers with an error \(500: .*\): see the server's log"),
        (503, b"", r"answers with an error \(503: .*\): see the server's log"),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_down(code, body, sentence, tmp_path):
    handler = type("Handler", (Answers,), {"code": code, "body": body})
    root = Storage(str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:hush@127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=sentence) as caught:
            Tracker(TrackingRecipe(uri=uri), root, root / "runs/small", "small")
        server.shutdown()
    assert f"MLflow at http://***@127.0.0.1:{server.server_port} " in str(caught.value)
    assert "me:hush" not in str(caught.value)


def test_a_store_that_does_not_answer_is_one_sentence(track, tmp_path):
    (tmp_path / "taken").write_text("not a database")
    with pytest.raises(UserError, match=r"cannot be used \(.*not a database.*\): check --tracking\.uri"):
        track(uri=f"sqlite:///{tmp_path}/taken")


def test_the_environment_names_the_store(track, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere/other.db")
    assert track().uri.endswith("elsewhere/other.db")
    assert (tmp_path / "elsewhere/other.db").exists()


def test_a_request_that_arrived_though_nobody_knew_it_is_not_there_twice(track, monkeypatch):
    tracker = track()
    log_batch = tracker._client.log_batch

    def lose_the_answer(*args, **kwargs):
        log_batch(*args, **kwargs)
        raise TimeoutError("timed out")

    rows = [row(step, **{f"metric/{number}": float(step) for number in range(300)}) for step in range(1, 11)]
    monkeypatch.setattr(tracker._client, "log_batch", lose_the_answer)
    with pytest.raises(UserError, match="timed out"):
        tracker.log_metrics(rows)
    monkeypatch.setattr(tracker._client, "log_batch", log_batch)
    tracker.log_metrics(rows)
    for number in (0, 150, 299):
        assert tracker.history(f"metric/{number}") == [(step, float(step)) for step in range(1, 11)]
