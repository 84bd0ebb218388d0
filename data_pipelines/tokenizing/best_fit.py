"""Best-fit packing: a document is cut only where it is longer than a sequence.

Attention and positions restart at a document's start, so that a document which a row's end cuts loses what came before
for nothing. Here whole documents are put together into rows: the longest first, each into the row that it fills best
(best fit decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.tokenizing.packing import Packed, Ragged, ragged


class _Cut(NamedTuple):
    """A document, or a part of one that is longer than a sequence: ``values[start:stop]``, after a BOS if ``bos``."""

    start: int
    stop: int
    bos: int

    @property
    def length(self) -> int:
        return self.stop - self.start + self.bos


def pack_best_fit(
    documents: Sequence[np.ndarray] | Ragged,
    sequence_length: int,
    pad_id: int,
    dtype: npt.DTypeLike,
    bos_id: int | None,
) -> Packed:
    """Put documents together into rows; no token is lost.

    A document that is longer than a row is cut into as few pieces as possible, each of which begins with BOS (if there
    is one) and becomes a segment of its own. The padding at a row's end is a segment too.

    Args:
        documents: token ids of each document, from its BOS on.
        sequence_length: tokens of a row.
        pad_id: id that fills the rows.
        dtype: type of the packed ids.
        bos_id: begins every further piece of a document; None if documents have no BOS.
    """
    documents = ragged(documents)
    rows = _fit(list(_pieces(documents.lengths, sequence_length, bos_id is not None)), sequence_length)
    tokens = np.full((len(rows), sequence_length), pad_id, dtype)
    trained = None if documents.trained is None else np.zeros((len(rows), sequence_length), np.uint8)
    starts, counts, lengths = list[int](), [0], list[int]()
    for row, pieces in enumerate(rows):
        column = 0
        for start, stop, bos in pieces:
            starts.append(column)
            if bos:
                tokens[row, column] = bos_id
                column += 1
            tokens[row, column : column + stop - start] = documents.values[start:stop]
            if trained is not None and documents.trained is not None:
                trained[row, column : column + stop - start] = documents.trained[start:stop]
            column += stop - start
        if column < sequence_length:
            starts.append(column)
        counts.append(len(pieces) + (column < sequence_length))
        lengths.append(column)
    offsets = np.array(list(accumulate(counts)), np.int32)
    return Packed(tokens, np.array(starts, np.int32), offsets, np.array(lengths, np.int32), trained)


def _pieces(lengths: np.ndarray, sequence_length: int, bos: bool) -> Iterator[_Cut]:
    """Cut what is longer than a row. The last piece is no mere scrap: the one before leaves it an eighth of a row."""
    least = sequence_length // 8
    start = 0
    for length in lengths.tolist():
        end, prefix, room = start + length, 0, sequence_length
        while end - start > room:
            left = end - start - room
            stop = start + room - max(0, least - left)
            yield _Cut(start, stop, prefix)
            start, prefix, room = stop, int(bos), sequence_length - bos
        if end > start:
            yield _Cut(start, end, prefix)
        start = end


def _fit(pieces: list[_Cut], sequence_length: int) -> list[list[_Cut]]:
    """The pieces of every row, in the order of the pieces; rows are in the order of their first pieces."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(sequence_length)]  # by the space that is left in them
    spaces = 0  # bit s: there is a row with s left
    for at in sorted(range(len(pieces)), key=lambda at: -pieces[at].length):
        length = pieces[at].length
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
            rows[row].append(at)
        else:
            space, row = sequence_length, len(rows)
            rows.append([at])
        if left := space - length:
            open_rows[left].append(row)
            spaces |= 1 << left
    return [[pieces[at] for at in sorted(row)] for row in sorted(rows, key=min)]
