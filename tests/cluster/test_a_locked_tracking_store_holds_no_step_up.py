"""MLflow's store is locked in the middle of a run: commits are made meanwhile, and every step is there afterwards."""

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from small_runs import STEPS, losses, samples, small_recipe

from cluster.runs.pretraining import pretrain


def test_commits_are_made_while_the_store_is_locked(ray_cluster, home, texts, capsys):
    recipe = small_recipe(home, texts, name="locked-store", scaling={"num_workers": 1})
    run = Path(recipe.storage, "runs/locked-store")
    committed: list[str] = []

    def newest_step() -> int:
        return max((int(path.name.split("-")[1]) for path in run.glob("checkpoints/step-*")), default=0)

    def lock() -> None:
        """From the first commit until the last, which a run that waited for MLflow would not reach."""
        while newest_step() < 10:
            time.sleep(0.01)
        store = sqlite3.connect(Path(recipe.storage, "mlflow.db"), timeout=60, isolation_level=None)
        store.execute("BEGIN EXCLUSIVE")
        committed.append(newest_step())
        deadline = time.monotonic() + 15
        while newest_step() < STEPS and time.monotonic() < deadline:
            time.sleep(0.01)
        committed.append(newest_step())
        store.execute("ROLLBACK")
        store.close()

    locker = threading.Thread(target=lock, daemon=True)
    locker.start()
    summary = pretrain(recipe)
    locker.join(20)
    assert committed[0] < committed[1] == STEPS
    assert sorted(losses(recipe)) == list(range(1, STEPS + 1))
    assert losses(recipe, "held_out_loss")[STEPS] == pytest.approx(summary.held_out_loss)
    assert sorted(losses(recipe, "unigram_loss")) == sorted(losses(recipe, "ledger/steps")) == [STEPS]
    assert sorted(samples(recipe)) == list(range(STEPS))
    assert "has not got" not in capsys.readouterr().out
