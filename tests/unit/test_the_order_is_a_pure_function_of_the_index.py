"""Sample i depends on the recipe and i alone; each row is dealt once an epoch; held-out rows are never trained on."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.order.mixture import SLOTS, Mixture, mixture_units
from data_pipelines.order.order import NothingHeldOut, NotReady, Order
from data_pipelines.order.permutation import file_order, permute
from doge.common.errors import UserError

weights = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 100), min_size=1, max_size=8).filter(
    lambda found: min(found.values()) / sum(found.values()) > 1 / SLOTS
)


class Shard(NamedTuple):
    rows: int
    held_out_rows: int
    last: bool


def held_out_rows(rows: int) -> int:
    """Of a made-up shard with so many rows in all."""
    return -(-rows // 4)


@st.composite
def corpora(draw):
    """Rows of each part of each file of each source, with at least eight rows a source."""
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    files = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=7)
    return {name: draw(files.filter(lambda rows: sum(map(sum, rows)) >= 8)) for name in names}


def catalog_of(corpus, known=lambda source, file, part: True):
    def catalog(source, file, part):
        rows = corpus[source][file]
        assert part < len(rows), "asked for a part past the end of a file"
        held_out = held_out_rows(rows[part])
        return Shard(rows[part] - held_out, held_out, part == len(rows) - 1) if known(source, file, part) else None

    return catalog


def order_of(corpus, catalog=None, seed=233, held_out=0, stripe=2):
    units = mixture_units(dict.fromkeys(corpus, 1.0))
    files = {name: len(rows) for name, rows in corpus.items()}
    return Order(units, files, seed, held_out, stripe, catalog or catalog_of(corpus))


@given(weights)
@settings(deadline=None, max_examples=30)
def test_every_prefix_of_the_mixture_is_less_than_one_sequence_off(found):
    units = mixture_units(found)
    assert sum(units.values()) == SLOTS
    mixture = Mixture(units)
    counts = Counter()
    for slot in range(2 * SLOTS + 7):
        source, position = mixture.locate(slot)
        assert position == counts[source]
        counts[source] += 1
        for name, share in units.items():
            assert abs(counts[name] - share * (slot + 1) / SLOTS) < 1
        assert mixture.count(source, slot + 1) == counts[source]


def test_the_published_mixture_is_exact():
    units = mixture_units({"fineweb": 7, "cosmopedia": 2, "python": 0.5, "math": 0.5})
    assert units == {"cosmopedia": 200, "fineweb": 700, "math": 50, "python": 50}


@pytest.mark.parametrize(
    ("found", "message"),
    [({}, "empty"), ({"a": 0}, "positive"), ({"a": float("nan")}, "positive"), ({"a": 1, "b": 1e-5}, "below 1/1000")],
)
def test_impossible_weights_are_refused(found, message):
    with pytest.raises(UserError, match=message):
        mixture_units(found)


@given(st.integers(1, 700), st.integers())
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_have_no_memory_of_the_input():
    size = 5000
    first, second = ([permute(index, size, key) for index in range(size)] for key in ("a", "b"))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert sum(abs(a - b) < 50 for a, b in pairwise(first)) < 3 * 2 * 50  # neighbours part
    assert file_order(50, 233, "web") != file_order(50, 234, "web") != list(range(50))


@given(corpora(), st.integers(0, 2), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_row_is_dealt_once_an_epoch_and_held_out_rows_never(corpus, held_out, stripe, seed):
    order = order_of(corpus, seed=seed, held_out=held_out, stripe=stripe)
    kept = {order.held_out(index) for index in range(held_out)}
    assert len(kept) == held_out
    behind, front = set(), set()
    for name, files in corpus.items():
        for file, parts in enumerate(files):
            for part, rows in enumerate(parts):
                first = rows - held_out_rows(rows)
                front |= {(name, file, part, row) for row in range(first)}
                behind |= {(name, file, part, row) for row in range(first, rows)}
    assert kept <= behind
    for name, source in order.sources.items():
        rows = {sample for sample in front if sample[0] == name}
        epochs = [[source.training(len(rows) * epoch + at) for at in range(len(rows))] for epoch in range(3)]
        for epoch in epochs:
            assert Counter(epoch) == Counter(rows)
        if len(rows) > 40:
            assert epochs[0] != epochs[1] != epochs[2]


@given(corpora(), st.integers(0, 2), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_samples_do_not_depend_on_how_far_tokenizing_has_got(corpus, held_out, chance):
    complete = order_of(corpus, held_out=held_out)
    expected = [complete.training(index) for index in range(60)]
    addresses = [(s, f, p) for s, files in corpus.items() for f, parts in enumerate(files) for p in range(len(parts))]
    chance.shuffle(addresses)
    known = set()
    growing = order_of(corpus, catalog_of(corpus, lambda *address: address in known), held_out=held_out)
    while addresses:
        known.update(addresses.pop() for _ in range(min(5, len(addresses))))
        fresh = order_of(corpus, catalog_of(corpus, lambda *address: address in known), held_out=held_out)
        for index, sample in enumerate(expected):
            for found in (sample_or_missing(growing, index), sample_or_missing(fresh, index)):
                assert found == sample if not isinstance(found, NotReady) else missing_address(found) not in known
    assert [growing.training(index) for index in range(60)] == expected


def sample_or_missing(order, index):
    try:
        return order.training(index)
    except NotReady as missing:
        return missing


def missing_address(missing):
    return missing.source, missing.file, missing.part


def test_training_starts_before_the_rest_is_prepared():
    corpus = {"a": [[10] * 5] * 6}
    first_group = {("a", 0, 0), ("a", 1, 0)}
    order = order_of(corpus, catalog_of(corpus, lambda *address: address in first_group))
    assert len({order.training(index) for index in range(14)}) == 14
    with pytest.raises(NotReady) as missing:
        order.training(14)
    assert (missing.value.file, missing.value.part) == (0, 1)


def test_a_source_with_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="no sequence to train on"):
        order_of({"a": [[1]]}, held_out=1).training(0)


def test_a_source_that_holds_too_little_out_gives_what_it_has():
    order = order_of({"a": [[5]], "b": [[20]]}, held_out=8)
    found = []
    for index in range(8):
        try:
            found.append(order.held_out(index).source)
        except NothingHeldOut:
            found.append(None)
    assert Counter(found) == {"a": 2, "b": 4, None: 2}


def test_a_held_out_set_without_a_sequence_is_refused():
    order = order_of({"a": [[5]]}, lambda *address: Shard(5, 0, True), held_out=3)
    with pytest.raises(UserError, match="No document of any source is held out"):
        order.held_out(0)


def test_the_order_is_the_one_that_checkpoints_were_written_with():
    """Frozen values: whoever changes them breaks the resumption of every run in the world."""

    def catalog(source, file, part):
        rows = {"a": [[7, 5], [9]], "b": [[20]]}[source][file]
        return Shard(rows[part], 2, part == len(rows) - 1)

    order = Order({"a": 500, "b": 500}, {"a": 2, "b": 1}, 233, 4, 2, catalog)
    assert [tuple(order.training(index)) for index in range(6)] == FROZEN_TRAINING
    assert [tuple(order.held_out(index)) for index in range(4)] == FROZEN_HELD_OUT


FROZEN_TRAINING = [("a", 1, 0, 8), ("b", 0, 0, 9), ("a", 0, 0, 3), ("b", 0, 0, 6), ("a", 0, 0, 1), ("b", 0, 0, 1)]
FROZEN_HELD_OUT = [("a", 1, 0, 10), ("b", 0, 0, 20), ("a", 0, 0, 7), ("b", 0, 0, 21)]
