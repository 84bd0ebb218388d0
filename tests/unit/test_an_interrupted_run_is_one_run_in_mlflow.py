import shutil
import subprocess
import sys

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
    return tracker.uri.removeprefix("sqlite:///")


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


def test_a_store_that_does_not_answer_is_one_sentence(track, tmp_path):
    (tmp_path / "taken").write_text("not a database")
    with pytest.raises(UserError, match=r"does not answer .* check --tracking\.uri"):
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
