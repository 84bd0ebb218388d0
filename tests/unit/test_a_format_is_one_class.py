"""A format is one registered class: recipes name it, give it options, and prepare with it; nothing else knows it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from data_pipelines.formats.base import FORMATS, Row, RowError, Turn, register, texts
from data_pipelines.order.packed_sequences import PackedSequences
from data_pipelines.order.plan import load_plan, make_plan
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from doge.common.config_tree import from_dict, to_dict
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe

TOKENIZER = TokenizerRecipe(vocab_size=300, training_bytes=2000)


@pytest.fixture(autouse=True)
def titled(monkeypatch):
    """A format that exists in this test alone: a title over a text."""
    monkeypatch.setattr("data_pipelines.formats.base.FORMATS", formats := dict(FORMATS))

    @dataclass(frozen=True)
    class Titled:
        text_column: str = "text"
        title_column: str = "title"
        conversations: ClassVar[bool] = False

        @property
        def columns(self) -> list[str]:
            return [self.title_column, self.text_column]

        def documents(self, rows: Sequence[Row]) -> list[str]:
            titles = texts(rows, self.title_column)
            if "" in titles:
                raise RowError(titles.index(""), "has no title")
            return [f"{title}\n\n{text}" for title, text in zip(titles, texts(rows, self.text_column), strict=True)]

    register("titled")(Titled)
    assert "titled" in formats


def recipe_of(folder, rows, **changes):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"path": str(folder / "a.jsonl"), "weight": 1, "format": "titled", "text_column": "body"} | changes
    recipe = from_dict(
        DataRecipe, {"sources": {"a": values}, "sequence_length": 32, "held_out_sequences": 2, "held_out_fraction": 0.3}
    )
    assert from_dict(DataRecipe, to_dict(recipe)) == recipe
    return recipe


def prepared(recipe, storage):
    plan = make_plan(recipe, TOKENIZER, storage)
    record = plan.make_shard(storage, "a", 0, 0, plan.open_tokenizer(storage))
    assert record.last
    return plan, record


def test_a_source_of_a_new_format_is_prepared_and_read(tmp_path):
    rows = [{"name": f"Chapter {number}", "body": f"It counts {number}. " * 5} for number in range(20)]
    storage = Storage(str(tmp_path / "store"))
    plan, record = prepared(recipe_of(tmp_path, rows, options={"title_column": "name"}), storage)
    assert record.documents == 20
    feed = PackedSequences(storage, plan.fingerprint)
    decoded = load_plan(storage, plan.fingerprint).open_tokenizer(storage).decode(feed.read(0, 30).tokens.ravel())
    assert any(f"Chapter {number}\n\nIt counts {number}. It" in decoded for number in range(20))


def test_untrained_messages_of_a_format_are_read_but_never_predicted(tmp_path):
    @register("chat")
    @dataclass(frozen=True)
    class Chat:
        conversations: ClassVar[bool] = True
        columns: ClassVar[list[str]] = ["messages"]

        def documents(self, rows: Sequence[Row]) -> list[tuple[Turn, ...]]:
            return [
                tuple(Turn(role, content, trained=role == "assistant") for role, content in row["messages"])
                for row in rows
            ]

    rows = [
        {"messages": [("user", f"What is {number}?"), ("assistant", f"A naïve {number}."), ("user", "Sure?"),
                      ("assistant", "Yes.")][: 2 + number % 3]}
        for number in range(12)
    ]  # fmt: skip
    storage = Storage(str(tmp_path / "store"))
    recipe = replace(recipe_of(tmp_path, rows, format="chat"), sequence_length=2048, held_out_sequences=0)
    plan, record = prepared(recipe, storage)
    (sequence,) = PackedSequences(storage, plan.fingerprint).read(0, 1).tokens
    (labels,) = PackedSequences(storage, plan.fingerprint).read(0, 1).labels
    tokenizer, ids, masks = plan.open_tokenizer(storage), [], []
    for row in rows:
        turns = [{"role": role, "content": content} for role, content in row["messages"]]
        encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids += encoded["input_ids"]
        masks += encoded["assistant_masks"]
    assert sequence[: record.tokens].tolist() == ids
    assert labels[: record.tokens].tolist() == [token if mask else -100 for token, mask in zip(ids, masks, strict=True)]
    assert set(labels[record.tokens :]) == {-100}


def test_other_options_are_other_shards(tmp_path):
    rows = [{"name": "A", "title": "B", "body": "text"}]
    storage = Storage(str(tmp_path / "store"))
    keys = {
        str(options): prepared(recipe_of(tmp_path, rows, options=options), storage)[0].keys["a"][0]
        for options in ({}, {"title_column": "name"}, {"title_column": "title"})
    }
    assert keys["{}"] != keys["{'title_column': 'name'}"] != keys["{'title_column': 'title'}"]


def test_a_row_that_is_not_as_it_should_be_is_named_by_its_number(tmp_path):
    rows = [{"title": "T", "body": "text"}] * 3 + [{"title": "", "body": "text"}]
    with pytest.raises(UserError, match=r"Row 4 of .*a\.jsonl has no title: repair it"):
        prepared(recipe_of(tmp_path, rows), Storage(str(tmp_path / "store")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "titles"}, "There is no format 'titles' of a source; the nearest is titled"),
        ({"format": "conversations"}, "the nearest is conversation "),
        ({"options": {"titel_column": "a"}}, "no option 'titel_column'; the nearest is title_column"),
        ({"format": "text", "options": {"text_column": "a"}}, "no option 'text_column'; its options are keys"),
    ],
)
def test_an_unknown_format_or_option_names_the_nearest(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, [], **changes)


def test_every_module_of_the_package_is_found():
    assert {"text", "conversation", "software-heritage"} <= set(FORMATS)
    assert SourceRecipe("a", 1, "software-heritage", blob_url="http://b").reader.blob_url == "http://b"
