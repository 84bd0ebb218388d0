"""A plan reads back as it was made, and only by the version of this project that made it."""

import json

import pytest

from data_pipelines.order.packed_sequences import PackedSequences
from data_pipelines.order.plan import load_plan, make_plan
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing import shards
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe


@pytest.fixture
def made(tmp_path):
    """A storage and its plan."""
    (tmp_path / "a.txt").write_text("Some text of a run that began long ago. " * 50)
    storage = Storage(str(tmp_path / "home"))
    recipe = DataRecipe({"a": SourceRecipe(str(tmp_path / "a.txt"), 1)}, held_out_sequences=0)
    return storage, make_plan(recipe, TokenizerRecipe(vocab_size=300, training_bytes=1000), storage)


def test_a_plan_reads_back_and_an_unknown_one_is_refused(made):
    storage, plan = made
    assert load_plan(storage, plan.fingerprint) == plan
    with pytest.raises(UserError, match="holds no data plan abc"):
        load_plan(storage, "abc")


@pytest.mark.parametrize("change", ["shards", "a key"])
def test_a_plan_of_another_version_is_one_sentence_that_says_what_to_do(made, monkeypatch, change):
    storage, plan = made
    if change == "shards":
        monkeypatch.setattr(shards, "FORMAT_VERSION", shards.FORMAT_VERSION + 1)
    else:
        name = f"plans/{plan.fingerprint}.json"
        values = json.loads(storage.read_bytes(name))
        values["recipe"]["shuffle_window"] = 7
        storage.write_bytes(name, json.dumps(values).encode())
    for opens in (load_plan, PackedSequences):
        with pytest.raises(UserError, match=r"is of another version of this project.*another --name, and --from"):
            opens(storage, plan.fingerprint)
