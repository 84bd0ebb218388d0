"""Packed rows hold the documents' tokens in order; positions and labels restart at every document and row."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokenizing.best_fit import pack_best_fit
from data_pipelines.tokenizing.packing import IGNORE_INDEX, Ragged, model_inputs, pack_stream, ragged, token_dtype

PAD = 2
documents = st.lists(
    st.lists(st.integers(3, 60_000), max_size=25).map(lambda ids: np.array(ids, np.uint16)), max_size=12
)


def expected_segments(lengths, width):
    """(row, start, stop) of every piece of a document, told one token at a time."""
    pieces, at = [], 0
    for length in lengths:
        left = length
        while left:
            take = min(left, width - at % width)
            pieces.append((at // width, at % width, at % width + take))
            at, left = at + take, left - take
    return pieces


@given(documents, st.integers(2, 16))
@settings(max_examples=200, deadline=None)
def test_no_token_is_lost_and_every_segment_restarts(found, width):
    packed = pack_stream(found, width, PAD, np.uint16)
    stream = [int(token) for document in found for token in document]
    assert packed.lengths.sum() == len(stream)
    assert packed.tokens.ravel().tolist()[: len(stream)] == stream
    assert set(packed.tokens.ravel().tolist()[len(stream) :]) <= {PAD}
    assert packed.tokens.size - len(stream) < width

    starts = [packed.starts[a:b] for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
    assert packed.lengths.tolist() == [min(width, len(stream) - row * width) for row in range(len(packed.tokens))]
    position_ids, labels = model_inputs(packed.tokens, starts, packed.lengths)
    expected_positions = np.full_like(position_ids, -1)
    expected_labels = np.full_like(labels, IGNORE_INDEX)
    for row, start, stop in expected_segments([len(document) for document in found], width):
        expected_positions[row, start:stop] = np.arange(stop - start)
        expected_labels[row, start + 1 : stop] = packed.tokens[row, start + 1 : stop]
    real = expected_positions >= 0
    assert np.array_equal(position_ids[real], expected_positions[real])
    assert np.array_equal(labels, expected_labels)
    if not real.all():
        row, column = np.argwhere(~real)[0]
        assert position_ids[row, column] == 0  # padding is a segment of its own


def test_the_hf_convention_on_one_row():
    packed = pack_stream([np.array([10, 11, 12]), np.array([20, 21])], 8, PAD, np.uint16)
    position_ids, labels = model_inputs(packed.tokens, [packed.starts], np.array([5]))
    assert packed.tokens.tolist() == [[10, 11, 12, 20, 21, 2, 2, 2]]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert labels.tolist() == [[-100, 11, 12, -100, 21, -100, -100, -100]]


def test_a_large_vocabulary_is_not_truncated():
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32
    for packed in (
        pack_stream([np.array([100_000], np.uint32)], 4, PAD, np.uint32),
        pack_best_fit([np.array([100_000], np.uint32)], 4, PAD, np.uint32, 1),
    ):
        assert packed.tokens[0, 0] == 100_000


BOS = 1


@given(documents, st.integers(2, 40), st.sampled_from([BOS, None]))
@settings(max_examples=200, deadline=None)
def test_best_fit_cuts_only_documents_that_are_longer_than_a_row(found, width, bos):
    packed = pack_best_fit(found, width, PAD, np.uint16, bos)
    pieces = pieces_of(packed, width)
    assert all(sum(map(len, row)) == length for row, length in zip(pieces, packed.lengths, strict=True))
    left = sorted([piece for row in pieces for piece in row])
    for document in found:
        whole = document.tolist()
        if 0 < len(whole) <= width:
            left.remove(whole)
    if all(len(document) <= width for document in found):
        assert left == []
    cut = [token for piece in left for token in piece if token != BOS]
    assert sorted(cut) == sorted(token for document in found if len(document) > width for token in document.tolist())
    for piece in left:  # of a long document: its beginning, or after a BOS
        begins = any(document[: len(piece)].tolist() == piece for document in found)
        assert begins or bos is None or piece[0] == BOS
    starts = [packed.starts[a:b] for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
    position_ids, labels = model_inputs(packed.tokens, starts, packed.lengths)
    for row, start in enumerate(starts):
        assert (position_ids[row, start] == 0).all()
        assert (labels[row, start] == IGNORE_INDEX).all()
        assert (labels[row, packed.lengths[row] :] == IGNORE_INDEX).all()


def pieces_of(packed, width) -> list[list[list[int]]]:
    """The segments of every row, without the padding."""
    rows = []
    for row, (a, b) in enumerate(zip(packed.offsets, packed.offsets[1:], strict=False)):
        length = packed.lengths[row]
        assert set(packed.tokens[row, length:].tolist()) <= {PAD}
        ends = [*packed.starts[a:b], width]
        bounds = [(start, stop) for start, stop in pairwise(ends) if start < length]
        rows.append([packed.tokens[row, start:stop].tolist() for start, stop in bounds])
    return rows


def test_every_further_piece_of_a_long_document_begins_with_bos_and_is_no_scrap():
    packed = pack_best_fit([np.arange(100, 133)], 16, PAD, np.uint16, BOS)
    assert pieces_of(packed, 16) == [
        [list(range(100, 116))],
        [[BOS, *range(116, 131)]],
        [[BOS, 131, 132]],
    ]
    packed = pack_best_fit([np.arange(100, 132)], 16, PAD, np.uint16, BOS)  # one token would be left over
    assert pieces_of(packed, 16)[1:] == [[[BOS, *range(116, 130)]], [[BOS, 130, 131]]]


def test_best_fit_leaves_little_padding_among_documents_of_many_lengths():
    chance = np.random.default_rng(0)
    lengths = np.maximum(2, chance.lognormal(6.3, 1.1, 4096).astype(int))  # the web's, roughly
    packed = pack_best_fit([np.full(length, 9) for length in lengths], 2048, PAD, np.uint16, BOS)
    assert packed.lengths.sum() / packed.tokens.size > 0.995


def test_the_mask_of_trained_tokens_moves_with_them():
    found = ragged([np.arange(10, 16), np.arange(20, 23), np.arange(30, 45)])
    trained = found.values % 2 == 0
    for packed in (
        pack_stream(Ragged(found.values, found.lengths, trained), 8, PAD, np.uint16),
        pack_best_fit(Ragged(found.values, found.lengths, trained), 8, PAD, np.uint16, BOS),
    ):
        text = packed.tokens >= 10
        assert np.array_equal(packed.trained[text] == 1, packed.tokens[text] % 2 == 0)
        assert not packed.trained[~text].any()


def test_rows_of_two_packings_are_one_packing():
    first, second = [np.arange(10, 15)], [np.arange(20, 33), np.arange(40, 42)]
    parts = [pack_best_fit(found, 8, PAD, np.uint16, BOS) for found in (first, second)]
    both = parts[0] + parts[1]
    assert pieces_of(both, 8) == pieces_of(parts[0], 8) + pieces_of(parts[1], 8)


def test_items_are_chosen_with_their_masks():
    found = Ragged(np.arange(6), np.array([1, 3, 2]), np.array([1, 0, 1, 0, 1, 1], bool))
    chosen = found.chosen(np.array([True, False, True]))
    assert [item.tolist() for item in chosen] == [[0], [4, 5]]
    assert chosen.trained.tolist() == [True, True, True]
