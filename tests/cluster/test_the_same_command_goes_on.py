"""Everything dies and the same command goes on, as a submitted job; checkpoints begin other runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import wait_until
from small_runs import STEPS, losses, samples, small_recipe

from cluster.runs.pretraining import Pretraining, pretrain
from doge.common.config_tree import to_yaml
from doge.common.errors import UserError

ROOT = Path(__file__).parents[2]
ONE_WORKER = {"scaling": {"num_workers": 1}}


def takes_jobs(dashboard: str) -> bool:
    """Whether an agent for jobs has registered, which follows the head's start by some seconds."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(dashboard).submit_job(entrypoint="true")
    except RuntimeError as error:
        if "No available agent" in str(error):
            return False
        raise
    return True


def test_an_interrupted_and_a_killed_driver_and_half_made_shards_change_no_sample(
    one_worker, ray_cluster, texts, tmp_path
):
    """The driver is interrupted, then killed, half the shards are taken away, and the command is submitted."""
    shutil.copytree(Path(one_worker[0].storage, "tokenizers"), tmp_path / "home/tokenizers")
    recipe = small_recipe(tmp_path / "home", texts, **ONE_WORKER)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    command = [sys.executable, "jobs/pretrain.py", "--recipe", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address}
    checkpoints = Path(recipe.storage, "runs/small/checkpoints")

    def newest() -> int:
        return max((int(path.name.split("-")[1]) for path in checkpoints.glob("step-*")), default=0)

    def run_until_a_commit(end: int) -> str:
        """Run the command until it has committed once more, and end it by a signal; returns what it said."""
        before = newest()
        with open(tmp_path / "log", "w") as log:
            driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            while newest() == before:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
            driver.send_signal(end)
            assert driver.wait() != 0
        return (tmp_path / "log").read_text()

    said = run_until_a_commit(signal.SIGTERM)
    assert "Interrupted: committing the last step" in said
    assert "Traceback" not in said
    assert max(samples(recipe)) == newest() - 1 < STEPS - 20  # the last step that was made
    assert f"from step {newest()}" in run_until_a_commit(signal.SIGKILL)
    shards = sorted(Path(recipe.storage, "shards").rglob("*.json"))
    assert len(shards) > 3
    for record in shards[1::2]:
        record.unlink()
    assert not Path(recipe.storage, "runs/small/summary.json").exists()

    submit = [Path(sys.executable).parent / "ray", "job", "submit", "--address", ray_cluster.dashboard]
    wait_until(lambda: takes_jobs(ray_cluster.dashboard), 60, "the head's agent for jobs")
    again = subprocess.run([*submit, "--working-dir", ".", "--", *command], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "succeeded" in again.stdout
    assert "held-out loss" in again.stdout
    log = again.stdout.split("Pretraining small")[1].split("MLflow")[0].splitlines()
    # Plain lines in a job's log; Ray adds its raylets' warnings in colour, as where many workers start at once.
    assert not [line for line in log if "\x1b" in line and "(raylet)" not in line]
    assert samples(recipe) == samples(one_worker[0])
    assert losses(recipe) == losses(one_worker[0])


def test_a_checkpoint_leaves_the_stable_phase_earlier(one_worker, texts, tmp_path):
    """`--from` a checkpoint of the stable phase: the same next step, and another schedule."""
    recipe, _ = one_worker
    early = small_recipe(recipe.storage, texts, **ONE_WORKER | {"name": "early", "lr_scheduler": {"decay_steps": 2}})
    pretrain(early, start_from=f"{recipe.storage}/runs/one-worker/checkpoints/step-{STEPS - 10:08d}")
    before, after = losses(recipe), losses(early)
    assert sorted(after) == list(range(STEPS - 9, STEPS + 1))
    assert after[STEPS - 9] == before[STEPS - 9]  # the loss before the first update that differs
    assert losses(early, "learning_rate")[STEPS - 2] == pytest.approx(3e-3)
    assert losses(recipe, "learning_rate")[STEPS - 2] < 3e-3
    assert samples(early)[STEPS - 10] == samples(recipe)[STEPS - 10]


def test_a_result_that_is_missing_is_made_without_workers(one_worker, monkeypatch):
    recipe, summary = one_worker
    directory = Path(recipe.storage, "runs", recipe.name)
    made = {name: (directory / name).stat().st_mtime_ns for name in ("model", "loss.png", "samples.txt")}
    kept = json.loads((directory / "summary.json").read_text())
    (directory / "samples.txt").unlink()
    (directory / "summary.json").write_text(json.dumps(kept | {"samples": [], "missing": ["samples"]}))
    monkeypatch.setattr(Pretraining, "execute", None)
    assert pretrain(recipe) == summary
    changed = {name for name, at in made.items() if (directory / name).stat().st_mtime_ns != at}
    assert changed == {"samples.txt"}


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(one_worker, texts, tmp_path):
    checkpoint = f"{one_worker[0].storage}/runs/one-worker/checkpoints/step-{STEPS:08d}"
    other = small_recipe(tmp_path, texts, model={"num_hidden_layers": 3}, training={"max_steps": STEPS + 10})
    with pytest.raises(UserError, match=r"The checkpoint is of another model: .*layers\.2\..* is missing there"):
        pretrain(other, start_from=checkpoint)
    assert not list(Path(tmp_path).glob("plans/*"))


def test_other_data_needs_the_tokenizer_that_the_weights_read_by(one_worker, texts, tmp_path):
    recipe = one_worker[0]
    checkpoint = f"{recipe.storage}/runs/one-worker/checkpoints/step-{STEPS:08d}"
    fewer = small_recipe(recipe.storage, {"code": texts["code"]}, name="other", training={"max_steps": STEPS + 10})
    with pytest.raises(UserError, match=r"another tokenizer: set --tokenizer.path .*/tokenizers/trained-"):
        pretrain(fewer, start_from=checkpoint)


def test_a_run_does_not_go_back(one_worker, texts):
    shorter = small_recipe(one_worker[0].storage, texts, name="one-worker", training={"max_steps": 25})
    with pytest.raises(UserError, match=f"is at step {STEPS} already"):
        Pretraining(shorter, None).execute()


def test_more_workers_than_the_cluster_can_hold_are_refused(ray_cluster, texts, tmp_path):
    with pytest.raises(UserError, match=r"5 workers were asked for, but the cluster has 1 node, 4 CPUs, .* room for 4"):
        pretrain(small_recipe(tmp_path, texts, scaling={"num_workers": 5, "wait_timeout_s": 0}))


def test_an_empty_source_file_ends_the_run_with_its_name(ray_cluster, texts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        pretrain(small_recipe(tmp_path / "home", texts | {"prose": str(tmp_path / "empty.jsonl")}, **ONE_WORKER))
