"""A tokenizer is trained on each source by its weight, whatever its files hold, and no word makes that long."""

import json
import random
import time
from dataclasses import replace

import pytest
from tiny_tokenizers import WORDS

from data_pipelines.order.plan import make_plan
from data_pipelines.order.tokenizer_store import shared_out
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.loading import fingerprint
from doge.tokenizer.training import LONGEST_WORD, TokenizerRecipe, train_tokenizer


def taken(units, lengths, training_bytes):
    """Bytes of each source, made of texts of ten bytes."""
    texts = {name: iter([name * 10] * (length // 10)) for name, length in lengths.items()}
    found = list(shared_out(texts, units, training_bytes))
    return {name: sum(len(text) for text in found if text[0] == name) for name in lengths}


def test_each_source_gives_its_weight():
    assert taken({"a": 700, "b": 300}, {"a": 10_000, "b": 10_000}, 1000) == {"a": 700, "b": 300}


def test_a_source_that_ends_leaves_its_rest_to_the_others_by_their_weights():
    lengths = {"a": 50, "b": 10_000, "c": 10_000}
    assert taken({"a": 500, "b": 400, "c": 100}, lengths, 1000) == {"a": 50, "b": 760, "c": 190}
    assert taken({"a": 500, "b": 500}, {"a": 50, "b": 70}, 1000) == {"a": 50, "b": 70}


@pytest.fixture
def recipe(tmp_path):
    for name, word in (("a", "river"), ("b", "stone")):
        rows = [{"text": f"The {word} {number} is here."} for number in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataRecipe({name: SourceRecipe(str(tmp_path / f"{name}.jsonl"), 1) for name in "ab"})


def test_another_mixture_is_another_tokenizer_and_another_seed_is_not(recipe, tmp_path):
    def name(recipe):
        return make_plan(recipe, TokenizerRecipe(None, 300, 500), Storage(str(tmp_path / "store"))).tokenizer

    uneven = {**recipe.sources, "a": replace(recipe.sources["a"], weight=3)}
    assert name(replace(recipe, seed=7)) == name(recipe)
    assert name(replace(recipe, sources=uneven)) != name(recipe)


def test_a_file_that_is_left_out_of_training_is_left_out_of_the_tokenizer(recipe, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    wanted, storage = TokenizerRecipe(None, 300, 500), Storage(str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"b\.jsonl"):
        make_plan(recipe, wanted, storage)
    make_plan(replace(recipe, skip_unreadable=True), wanted, storage)


@pytest.mark.parametrize("kind", ["ACGT", "=+-*", " \t"], ids=["letters", "signs", "spaces"])
def test_one_long_word_does_not_stop_the_training(kind):
    word = "".join(random.Random(0).choices(kind, k=400_000))
    start = time.process_time()
    tokenizer = train_tokenizer([*WORDS, word], 1000)
    assert time.process_time() - start < 10
    assert max(len(token) for token in tokenizer.get_vocab()) <= LONGEST_WORD
    assert tokenizer.decode(tokenizer.encode(word, add_special_tokens=False)) == word


def test_words_of_ordinary_length_are_trained_on_whole(monkeypatch):
    texts = [*WORDS, "x" * LONGEST_WORD]
    cut = fingerprint(train_tokenizer(texts, 500))
    monkeypatch.setattr("doge.tokenizer.training.LONGEST_WORD", 1000)
    assert fingerprint(train_tokenizer(texts, 500)) == cut
