"""Documents to rows of ``sequence_length`` tokens, and rows to what the model is fed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100  # the label that transformers' losses skip


class Ragged(Sequence[np.ndarray]):
    """Arrays of different lengths, laid end to end in one; item *i* is a view.

    Args:
        values: (sum of lengths,).
        lengths: (items,) int64.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray):
        self.values, self.lengths = values, lengths
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> np.ndarray:
        end = self._ends[item]
        return self.values[end - self.lengths[item] : end]


def ragged(arrays: Sequence[np.ndarray]) -> Ragged:
    """The arrays of any sequence laid end to end; a Ragged as it is."""
    if isinstance(arrays, Ragged):
        return arrays
    lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
    return Ragged(np.concatenate([*arrays, np.empty(0, np.uint8)], dtype=np.int64), lengths)


class Packed(NamedTuple):
    """Rows of tokens and where their segments start.

    Attributes:
        tokens: (rows, sequence_length) uint16, or uint32 for a vocabulary above 65,536.
        starts: (segments,) int32, columns at which a segment starts, row after row; a row always starts one.
        offsets: (rows + 1,) int32, row r's starts are ``starts[offsets[r]:offsets[r + 1]]``.
        length: tokens of all rows without the padding that fills the last one.
    """

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    length: int


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack(documents: Sequence[np.ndarray], sequence_length: int, pad_id: int, dtype=np.uint16) -> Packed:
    """Cut the stream of the documents' tokens into rows; of a Ragged without a look at any single document.

    No token is lost. A document cut by a row's end goes on as a new segment of the next row; the padding at the end of
    the last row is a segment of its own.
    """
    documents = ragged(documents)
    lengths = documents.lengths[documents.lengths > 0]
    length = len(documents.values)
    rows = -(-length // sequence_length)
    stream = np.full(rows * sequence_length, pad_id, dtype)
    stream[:length] = documents.values
    row_starts = np.arange(rows) * sequence_length
    starts = np.unique(np.concatenate([np.cumsum(lengths) - lengths, row_starts, [length]]))
    starts = starts[starts < len(stream)]
    return Packed(
        tokens=stream.reshape(rows, sequence_length),
        starts=(starts % sequence_length).astype(np.int32),
        offsets=np.searchsorted(starts, np.append(row_starts, len(stream))).astype(np.int32),
        length=length,
    )


def model_inputs(tokens: np.ndarray, starts: list[np.ndarray], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position ids and labels of packed rows.

    Args:
        tokens: (n, sequence_length).
        starts: for each row, the columns at which its segments start.
        lengths: (n,) tokens of each row before padding.

    Returns:
        ``position_ids`` (n, sequence_length) int64, 0 at every segment's first token, and ``labels`` (n,
        sequence_length) int64, the tokens themselves (the model shifts them) with `IGNORE_INDEX` at every segment's
        first token, which nothing before it may predict, and at padding.
    """
    columns = np.arange(tokens.shape[1])
    first = np.zeros(tokens.shape, bool)
    for row, columns_of_row in enumerate(starts):
        first[row, columns_of_row] = True
    position_ids = columns - np.maximum.accumulate(np.where(first, columns, 0), axis=1)
    labels = np.where(first | (columns >= lengths[:, None]), IGNORE_INDEX, tokens.astype(np.int64))
    return position_ids, labels
