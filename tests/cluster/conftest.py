"""Real text to train on, and what several files of tests share, since to prepare and to start takes longest."""

import inspect
import json
import random
import tempfile

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
