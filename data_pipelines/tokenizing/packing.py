"""Documents to rows of ``sequence_length`` tokens, and rows to the model's inputs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100  # the label that transformers' losses skip


class Ragged:
    """Arrays of different lengths in one array, end to end; item *i* is a view.

    Args:
        values: (sum of lengths,).
        lengths: (items,) int64.
        trained: (sum of lengths,) bool, False for tokens that are not predicted; None if all are.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray, trained: np.ndarray | None = None):
        self.values, self.lengths, self.trained = values, lengths, trained
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> np.ndarray:
        end = self._ends[item]
        return self.values[end - self.lengths[item] : end]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[item] for item in range(len(self)))

    def chosen(self, mask: np.ndarray) -> "Ragged":
        """The items where ``mask`` (items,) is True."""
        inside = np.repeat(mask, self.lengths)
        trained = None if self.trained is None else self.trained[inside]
        return Ragged(self.values[inside], self.lengths[mask], trained)


def ragged(arrays: Sequence[np.ndarray] | Ragged) -> Ragged:
    """Put arrays end to end; a Ragged is returned as it is."""
    if isinstance(arrays, Ragged):
        return arrays
    lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
    return Ragged(np.concatenate([*arrays, np.empty(0, np.uint8)], dtype=np.int64), lengths)


class Packed(NamedTuple):
    """Rows of tokens and where their segments start.

    Attributes:
        tokens: (rows, sequence_length) uint16, or uint32 for a vocabulary above 65,536.
        starts: (segments,) int32, columns at which a segment starts, row after row; a row always starts one.
        offsets: (rows + 1,) int32; ``starts[offsets[r]:offsets[r + 1]]`` belong to row r.
        lengths: (rows,) int32, tokens of a row before its padding.
        trained: (rows, sequence_length) uint8, 0 for tokens that are not predicted; None if all are.
    """

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None = None

    def __add__(self, more: "Packed") -> "Packed":  # type: ignore[override]
        """The rows of both."""
        trained = None
        if self.trained is not None and more.trained is not None:
            trained = np.concatenate([self.trained, more.trained])
        return Packed(
            tokens=np.concatenate([self.tokens, more.tokens]),
            starts=np.concatenate([self.starts, more.starts]),
            offsets=np.concatenate([self.offsets, more.offsets[1:] + self.offsets[-1]]),
            lengths=np.concatenate([self.lengths, more.lengths]),
            trained=trained,
        )


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds all ids of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack_stream(
    documents: Sequence[np.ndarray] | Ragged, sequence_length: int, pad_id: int, dtype: npt.DTypeLike
) -> Packed:
    """Cut the stream of the documents' tokens into rows.

    No token is lost. A document that a row's end cuts continues as a new segment of the next row; the padding at the
    end of the last row is a segment of its own.

    Args:
        documents: token ids of each document; a Ragged is packed without a loop over its documents.
        sequence_length: tokens of a row.
        pad_id: id that fills the last row.
        dtype: type of the packed ids.
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
    trained = None
    if documents.trained is not None:
        trained = np.zeros((rows, sequence_length), np.uint8)
        trained.ravel()[:length] = documents.trained
    return Packed(
        tokens=stream.reshape(rows, sequence_length),
        starts=(starts % sequence_length).astype(np.int32),
        offsets=np.searchsorted(starts, np.append(row_starts, len(stream))).astype(np.int32),
        lengths=np.minimum(length - row_starts, sequence_length).astype(np.int32),
        trained=trained,
    )


def model_inputs(
    tokens: np.ndarray, starts: list[np.ndarray], lengths: np.ndarray, trained: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Make the position ids and labels of packed rows.

    Args:
        tokens: (n, sequence_length).
        starts: for each row, the columns at which its segments start.
        lengths: (n,) tokens of each row before padding.
        trained: (n, sequence_length), 0 for tokens that are not predicted; None if all are.

    Returns:
        ``position_ids`` (n, sequence_length) int64, 0 at every segment's first token, and ``labels`` (n,
        sequence_length) int64, the tokens themselves (the model shifts them) with `IGNORE_INDEX` at every segment's
        first token, which nothing before it may predict, at untrained tokens and at padding.
    """
    columns = np.arange(tokens.shape[1])
    first = np.zeros(tokens.shape, bool)
    for row, columns_of_row in enumerate(starts):
        first[row, columns_of_row] = True
    position_ids = columns - np.maximum.accumulate(np.where(first, columns, 0), axis=1)
    ignored = first | (columns >= lengths[:, None])
    if trained is not None:
        ignored |= trained == 0
    labels = np.where(ignored, IGNORE_INDEX, tokens.astype(np.int64))
    return position_ids, labels
