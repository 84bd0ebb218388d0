"""After the last step each result stands alone: one that fails is said, and the same command makes it and no other."""

import io
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from recorded_runs import driving, make_steps, recorded_run

from cluster.runs import collector
from cluster.runs import summary as summary_module
from cluster.runs.pretraining import Pretraining, pretrain
from cluster.runs.recipe import Recipe
from cluster.runs.run import Run
from cluster.runs.sinks.tracking_sink import TrackingSink
from cluster.runs.summary import Results, read_summary
from doge.common.config_tree import from_dict, to_yaml
from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError

RESULTS = ("model", "samples", "bits per byte", "baselines", "loss curve", "timeline")
STEP = 20


@pytest.fixture
def makers(monkeypatch):
    """What makes the results, in place of what takes long; a name that is added to the set fails. Notes each call."""
    import doge.conversion.export
    import doge.generation.samples
    import doge.reporting.plots

    failing, made = set(), []

    def maker(name, result=None):
        def make(*args, **_):
            made.append(name)
            if name in failing:
                raise OSError(28, f"no room for the {name} at http://me:hush@host")
            if name == "model":
                args[3].write_bytes(f"{args[4]}/weights", b"1")
            if name in ("loss curve", "timeline"):
                args[0].write_bytes(b"png")
            return result

        return make

    monkeypatch.setattr(doge.conversion.export, "export_model", maker("model", "a model"))
    monkeypatch.setattr(doge.generation.samples, "generate_samples", maker("samples", ["a", "b", "c"]))
    monkeypatch.setattr(doge.reporting.plots, "plot_losses", maker("loss curve"))
    monkeypatch.setattr(doge.reporting.plots, "plot_lanes", maker("timeline"))
    monkeypatch.setattr(summary_module, "_open_model", lambda directory: directory.read_bytes("model/weights"))
    counted = SimpleNamespace(unigram=3.0, bigram=2.0, tokens=5)
    monkeypatch.setattr(summary_module, "_held_out_text", maker("bits per byte", (10, 40)))
    monkeypatch.setattr(summary_module, "_baselines", maker("baselines", counted))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return failing, made


PLAN = SimpleNamespace(open_tokenizer=lambda storage: "a tokenizer", fingerprint="0")
CHECKPOINT = SimpleNamespace(step=STEP), SimpleNamespace(tokens_seen=160, next_unit=160)


def recipe_of(root) -> Recipe:
    values = {"training": {"max_steps": STEP}, "lr_scheduler": {"warmup_steps": 1, "decay_steps": 1}}
    return from_dict(Recipe, {"name": "small", "storage": str(root)} | values)


def make_results(root, output):
    run, storage = recorded_run(root, output), Storage(str(root))
    with driving(run) as board:
        make_steps(board, range(1, STEP + 1))
        board.settle()
        return Results(recipe_of(root), PLAN, storage, run, CHECKPOINT).make()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without MLflow's store and the lease, which take seconds and are other files' matter."""
    monkeypatch.setattr(collector, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(Run, "claim", lambda self, storage=None: nullcontext())
    monkeypatch.setattr(Run, "_check_tracking", lambda self, delivery: None)
    monkeypatch.setattr(TrackingSink, "handle", lambda self, entries: None)


@pytest.mark.parametrize("failing", RESULTS)
def test_a_result_that_fails_takes_no_other_with_it(failing, makers, tmp_path):
    fails, made = makers
    fails.add(failing)
    output = io.StringIO()
    summary = make_results(tmp_path, output)
    missing = ["model", "samples"] if failing == "model" else [failing]  # which the model writes
    assert (summary.step, summary.missing) == (STEP, missing)
    assert set(made) == set(RESULTS) - ({"samples"} if failing == "model" else set())
    assert f"The run's {failing} could not be made: [Errno 28] no room for the {failing} at" in output.getvalue()
    assert "hush" not in output.getvalue()
    assert (tmp_path / "runs/small/model/weights").exists() == (failing != "model")
    kept = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert kept["missing"] == summary.missing

    fails.clear()
    made.clear()
    again = make_results(tmp_path, io.StringIO())
    assert made == summary.missing
    assert again.missing == []
    assert (again.bigram_loss, again.held_out_loss, len(again.samples)) == (2.0, 2.0, 3)
    assert again.held_out_bits_per_byte == pytest.approx(0.5 / math.log(2))


def test_the_model_comes_first_and_is_kept_when_the_rest_is_interrupted(makers, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary_module, "_baselines", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_results(tmp_path, io.StringIO())
    kept = read_summary(recipe_of(tmp_path), Storage(str(tmp_path)), Storage(str(tmp_path)) / "runs/small")
    assert kept.missing == ["baselines", "loss curve", "timeline"]


def test_a_storage_that_is_full_loses_no_result_for_good(makers, tmp_path, monkeypatch):
    write = Storage.write_bytes

    def full(self, name, content):
        if name == "samples.txt":
            raise StorageError("The disk is full.")
        write(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", full)
    output = io.StringIO()
    assert make_results(tmp_path, output).missing == ["samples"]
    assert "The run's samples could not be made: The disk is full.\n" in output.getvalue()


def test_places_are_those_of_today(makers, tmp_path):
    make_results(tmp_path / "old", io.StringIO())
    (tmp_path / "old").rename(tmp_path / "new")
    storage = Storage(str(tmp_path / "new"))
    summary = read_summary(recipe_of(tmp_path / "new"), storage, storage / "runs/small")
    assert (summary.model, summary.plot) == (f"{tmp_path}/new/runs/small/model", f"{tmp_path}/new/runs/small/loss.png")
    assert f"{tmp_path}/new/mlflow.db" in summary.show_command


@pytest.fixture
def trained(makers, tmp_path, monkeypatch):
    """A run with its last checkpoint, whose workers must not be started again."""
    import data_pipelines.order.plan

    def start(*_):
        raise AssertionError("nothing must be trained")

    monkeypatch.setattr(Pretraining, "execute", start)
    monkeypatch.setattr(Pretraining, "_steps", lambda self: [10, STEP])
    monkeypatch.setattr(Pretraining, "_last_checkpoint", lambda self: CHECKPOINT)
    monkeypatch.setattr(data_pipelines.order.plan, "load_plan", lambda storage, fingerprint: PLAN)
    recipe, directory = recipe_of(tmp_path), Storage(str(tmp_path)) / "runs/small"
    directory.write_bytes("recipe.yaml", to_yaml(recipe).encode())
    directory.write_bytes("data_plan", b"0")
    return recipe


def test_the_same_command_makes_what_is_missing_without_workers_and_its_status_tells(trained, makers, capsys):
    fails, made = makers
    fails |= {"samples", "loss curve"}
    with pytest.raises(
        UserError, match=r"trained, but lacks its samples and loss curve: run .* The model is in /.*/mo"
    ):
        pretrain(trained)
    fails.discard("samples")
    made.clear()
    with pytest.raises(UserError, match="lacks its loss curve: run the same command again"):
        pretrain(trained)
    assert made == ["samples", "loss curve"]
    fails.clear()
    assert pretrain(trained).missing == []
    made.clear()
    capsys.readouterr()
    assert pretrain(trained).missing == []
    assert "is finished: choose another --name" in capsys.readouterr().out
    assert made == []


def test_events_that_mlflow_has_not_got_are_missing_too(trained, makers, monkeypatch, capsys):
    taken = []

    def refuse(self, entries):
        raise UserError("MLflow does not answer.")

    monkeypatch.setattr(TrackingSink, "handle", refuse)
    monkeypatch.setattr(TrackingSink, "close_seconds", 0.5)
    for _ in range(2):  # the second one has nothing else to make
        with pytest.raises(UserError, match=r"lacks its events for MLflow: run .* The model is in /"):
            pretrain(trained)
    assert "MLflow has not got the last" in capsys.readouterr().out
    monkeypatch.setattr(TrackingSink, "handle", lambda self, entries: taken.extend(entries))
    assert pretrain(trained).missing == []
    assert taken


def test_the_directory_of_a_run_is_no_checkpoint(tmp_path):
    (tmp_path / "runs/other/checkpoints/step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is the directory of a run: give one of its .*/checkpoints/step-00000010\."):
        Pretraining(recipe_of(tmp_path), f"{tmp_path}/runs/other").execute()


def test_a_last_checkpoint_that_is_damaged_is_made_again(trained, monkeypatch):
    monkeypatch.setattr(Pretraining, "_last_checkpoint", lambda self: (SimpleNamespace(step=10), None))
    with pytest.raises(AssertionError, match="nothing must be trained"):
        pretrain(trained)
