"""Which packed documents attend side by side, as the rows of one batch.

An attention kernel shares its work out over rows and heads: a small model's documents, one by one, leave threads idle,
and short ones cost more to begin than to compute.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CALL = 200 * 200  # what a call of the kernel costs beside its work, in pairs of tokens
TOKEN = 128  # what a token costs beside the tokens that it attends to, in pairs of tokens


@dataclass(frozen=True)
class DocumentGroup:
    """Documents as the rows of a batch, filled up to the longest at their ends.

    Args:
        index: (documents, longest) int64, where each token lies in the concatenation of all documents; filled up with
            the document's last token.
        filling: (documents, longest) bool, what only fills up; None where all are as long.
    """

    index: Tensor
    filling: Tensor | None

    def take(self, tokens: Tensor) -> Tensor:
        """(all tokens, heads, channels) -> (documents, heads, longest, channels)."""
        return tokens.index_select(0, self.index.flatten()).unflatten(0, self.index.shape).transpose(1, 2)

    def take_filled_with_zeros(self, tokens: Tensor) -> Tensor:
        """`take`, but what fills up is zero."""
        found = self.take(tokens)
        return found if self.filling is None else found.masked_fill_(self.filling[:, None, :, None], 0.0)

    def put(self, target: Tensor, rows: Tensor) -> None:
        """Write (documents, heads, longest, channels) to where the group's tokens lie in ``target``, as for `take`."""
        found = rows.transpose(1, 2).flatten(0, 1)
        index = self.index.flatten()
        if self.filling is not None:
            real = (~self.filling).flatten().nonzero()[:, 0]
            found, index = found.index_select(0, real), index.index_select(0, real)
        target.index_copy_(0, index, found)


@functools.lru_cache(maxsize=8)  # all layers ask alike
def group_documents(starts: tuple[int, ...], lengths: tuple[int, ...], heads: int, threads: int) -> list[DocumentGroup]:
    """The groups that cost least on so many threads, if each of them computes one head of one document at a time.

    Args:
        starts: where in the concatenation of all documents each begins.
        lengths: how many of its tokens, one at least, attend here.
    """
    by_length = np.argsort(-np.array(lengths), kind="stable")
    return [_group([(starts[at], lengths[at]) for at in by_length[part]]) for part in _split(lengths, heads, threads)]


def _split(lengths: tuple[int, ...], heads: int, threads: int) -> Iterator[slice]:
    """The cheapest way to cut the documents, the longest first, into runs."""
    longest = np.sort(np.array(lengths))[::-1].astype(np.float64)
    number = len(lengths)
    pairs = longest * (longest + TOKEN)
    least, begin = np.zeros(number + 1), np.zeros(number + 1, int)
    for stop in range(1, number + 1):
        rounds = np.ceil(np.arange(stop, 0, -1) * heads / threads)  # for each document that may be the run's first
        cost = least[:stop] + rounds * pairs[:stop] + CALL
        begin[stop] = cost.argmin()
        least[stop] = cost[begin[stop]]
    stop = number
    while stop:
        yield slice(begin[stop], stop)
        stop = begin[stop]


def _group(documents: list[tuple[int, int]]) -> DocumentGroup:
    starts, lengths = torch.tensor(documents).T[..., None]
    places = torch.arange(int(lengths.max()))
    filling = places >= lengths
    return DocumentGroup(starts + torch.minimum(places, lengths - 1), filling if filling.any() else None)
