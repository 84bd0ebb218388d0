"""Packed rows hold the documents' tokens in order; positions and labels restart at every document and row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokenizing.packing import IGNORE_INDEX, model_inputs, pack, token_dtype

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
    packed = pack(found, width, PAD)
    stream = [int(token) for document in found for token in document]
    assert packed.length == len(stream)
    assert packed.tokens.ravel().tolist()[: len(stream)] == stream
    assert set(packed.tokens.ravel().tolist()[len(stream) :]) <= {PAD}
    assert packed.tokens.size - len(stream) < width

    starts = [packed.starts[a:b] for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
    lengths = np.array([min(width, len(stream) - row * width) for row in range(len(packed.tokens))], int)
    position_ids, labels = model_inputs(packed.tokens, starts, lengths)
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
    packed = pack([np.array([10, 11, 12]), np.array([20, 21])], 8, PAD)
    position_ids, labels = model_inputs(packed.tokens, [packed.starts], np.array([5]))
    assert packed.tokens.tolist() == [[10, 11, 12, 20, 21, 2, 2, 2]]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert labels.tolist() == [[-100, 11, 12, -100, 21, -100, -100, -100]]


def test_a_large_vocabulary_is_not_truncated():
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32
    assert pack([np.array([100_000], np.uint32)], 4, PAD, np.uint32).tokens[0, 0] == 100_000
