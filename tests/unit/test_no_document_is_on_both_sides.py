"""What is held out is not trained on: no document, and no module of the Python installation in another source."""

import json

import numpy as np
import pytest
from whole_plans import make_everything

from data_pipelines.order.packed_sequences import PackedSequences
from data_pipelines.order.plan import make_plan
from data_pipelines.sources.embedded import SCHEME, rows
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.held_out import held_out
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe

LONG = 80  # characters that two texts do not share by chance


def prepared(recipe, folder):
    storage = Storage(str(folder))
    plan = make_plan(recipe, TokenizerRecipe(vocab_size=1000, training_bytes=100_000), storage)
    make_everything(plan, storage)
    return storage, plan, plan.open_tokenizer(storage)


def texts(feed, count, tokenizer) -> list[str]:
    """The text of every document, or piece of one, of the first sequences, without the special tokens."""
    found = feed.read(0, count)
    pieces = []
    for tokens, positions, labels in zip(found.tokens, found.position_ids, found.labels, strict=True):
        starts = np.flatnonzero(positions == 0)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if (labels[start:stop] >= 0).any():
                pieces.append(tokenizer.decode(tokens[start:stop], skip_special_tokens=True))
    return pieces


def both_sides(storage, plan, tokenizer) -> tuple[list[str], list[str]]:
    training = PackedSequences(storage, plan.fingerprint)
    order = plan.order(training._catalog)
    for source in order.sources.values():
        while not source.finished:
            source.extend()
    epoch = 2 * max(source.training_rows * 1000 // plan.units[name] for name, source in order.sources.items())
    kept = PackedSequences(storage, plan.fingerprint, held_out=True)
    return texts(training, epoch, tokenizer), texts(kept, kept.length, tokenizer)


@pytest.mark.slow
def test_no_module_of_the_python_installation_is_on_both_sides(tmp_path):
    sources = {
        "prose": SourceRecipe(SCHEME + "prose", 0.5, max_bytes=60_000),
        "code": SourceRecipe(SCHEME + "code", 0.3, max_bytes=150_000),
        "chat": SourceRecipe(SCHEME + "conversation", 0.2, "conversation", max_bytes=120_000),
    }
    recipe = DataRecipe(sources, sequence_length=128, held_out_sequences=60, held_out_fraction=0.3)
    storage, plan, tokenizer = prepared(recipe, tmp_path)
    modules: dict[str, str] = {}
    for files in plan.files.values():
        for file in files:
            for row in rows(file.path):
                modules[row["module"]] = modules.get(row["module"], "") + row.get("prompt", "") + "\n" + row["text"]

    def modules_of(pieces):
        """Those that a piece is from, where no other one has the same text."""
        found = [
            [name for name, text in modules.items() if piece.strip() in text] for piece in pieces if len(piece) > LONG
        ]
        return {names[0] for names in found if len(names) == 1}

    training, kept = (modules_of(pieces) for pieces in both_sides(storage, plan, tokenizer))
    assert len(kept) > 3
    assert len(training) > 10
    assert not training & kept


def test_no_text_is_on_both_sides_also_where_two_sources_hold_it(tmp_path):
    for number in range(2):
        lines = [{"text": f"Text {at} of both: " + f"word{at} " * (at * 13 % 90)} for at in range(120)]
        lines += [{"text": f"Text {at} of {number} alone."} for at in range(50)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = {name: SourceRecipe(str(tmp_path / f"{at}.jsonl"), 1) for at, name in enumerate("ab")}
    recipe = DataRecipe(sources, sequence_length=64, held_out_sequences=30, held_out_fraction=0.2)
    training, kept = (set(found) for found in both_sides(*prepared(recipe, tmp_path / "home")))
    assert len(training) > 200
    assert len(kept) > 15
    assert not training & kept


def test_rows_with_a_common_value_go_together(tmp_path):
    lines = [{"text": f"Part {at} of book {at % 20}.", "book": at % 20} for at in range(400)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceRecipe(str(tmp_path / "books.jsonl"), 1, group_column="book")
    recipe = DataRecipe({"a": source}, sequence_length=32, held_out_sequences=20, held_out_fraction=0.25)
    sides = both_sides(*prepared(recipe, tmp_path / "home"))
    training, kept = ({text.split("book ")[1] for text in found} for found in sides)
    assert len(training | kept) > 18
    assert kept
    assert not training & kept


def test_about_the_fraction_is_held_out_and_always_the_same():
    groups = [f"document {at}" for at in range(20_000)]
    mask = held_out(groups, 0.05)
    assert mask.mean() == pytest.approx(0.05, abs=0.005)
    assert np.array_equal(held_out(groups[::-1], 0.05)[::-1], mask)
    assert not (mask & ~held_out(groups, 0.1)).any()  # a larger fraction holds out more, not others
    assert not held_out(groups, 0.0).any()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_is_none_is_one_sentence(fraction):
    with pytest.raises(UserError, match=r"data\.held_out_fraction must be at least 0 and below 1"):
        DataRecipe(held_out_fraction=fraction)


def test_to_hold_out_a_set_of_no_documents_is_one_sentence():
    with pytest.raises(UserError, match=r"set both to 0 to hold nothing out"):
        DataRecipe(held_out_fraction=0.0)
    assert DataRecipe(held_out_fraction=0.0, held_out_sequences=0).holds_out == 0
