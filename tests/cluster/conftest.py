"""Real text to train on, and what several files of tests share, since to prepare and to start takes longest."""

import contextlib
import inspect
import io
import json
import random
import sqlite3
import tempfile
import threading
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """Two sources of real text, as JSON lines and parquet, cut out of the standard library."""
    import argparse
    import typing

    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("texts")
    for file, module in enumerate((argparse, typing, inspect)):
        blocks = inspect.getsource(module).split("\n\n")
        lines = (json.dumps({"text": block}) for block in blocks if block.strip())
        (folder / f"code-{file}.jsonl").write_text("\n".join(lines))
    random.seed(0)
    prose = [line for line in inspect.getsource(tempfile).split("\n") if line.strip()]
    rows = [" ".join(random.choices(prose, k=4)) for _ in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "prose.parquet")
    return {"code": f"{folder}/code-*.jsonl", "prose": f"{folder}/prose.parquet"}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A storage for runs of different names, which share the tokenizer, the shards and the tracking store."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def one_worker(ray_cluster, home, texts):
    """A finished run of the small recipe with one worker: its recipe and its summary."""
    from small_runs import small_recipe

    from cluster.runs.pretraining import pretrain

    recipe = small_recipe(home, texts, name="one-worker", scaling={"num_workers": 1, "shares": "equal"})
    return recipe, pretrain(recipe)


@pytest.fixture(scope="session")
def two_workers(ray_cluster, home, texts):
    """A finished run of the small recipe with two workers, beside a tracking store that was locked meanwhile.

    Its recipe, its summary, the newest commit when the store was locked and when it was free again, and its output.
    """
    from small_runs import STEPS, small_recipe

    from cluster.runs.pretraining import pretrain

    recipe = small_recipe(home, texts, name="two-workers", scaling={"num_workers": 2, "shares": "equal"})
    committed: list[int] = []

    def newest() -> int:
        folder = Path(recipe.storage, "runs/two-workers/checkpoints")
        return max((int(path.name.split("-")[1]) for path in folder.glob("step-*")), default=0)

    def wait_for(step: int, timeout_s: float) -> float:
        begun = time.monotonic()
        while newest() < step and time.monotonic() - begun < timeout_s:
            time.sleep(0.01)
        return time.monotonic() - begun

    def lock() -> None:
        """From the second commit until the last, for three times as long as the commits need on this machine."""
        wait_for(10, 600)
        pace = wait_for(20, 600)
        store = sqlite3.connect(Path(recipe.storage, "mlflow.db"), timeout=60, isolation_level=None)
        store.execute("BEGIN EXCLUSIVE")
        committed.append(newest())
        wait_for(STEPS, 10 + 3 * pace * (STEPS - committed[0]) / 10)
        committed.append(newest())
        store.execute("ROLLBACK")
        store.close()

    locker = threading.Thread(target=lock, daemon=True)
    locker.start()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            summary = pretrain(recipe)
    finally:
        print(output.getvalue())
    locker.join(60)
    return recipe, summary, committed, output.getvalue()
