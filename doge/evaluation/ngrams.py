"""What a model must beat: n-gram models counted on the tokens that it was trained on."""

from collections.abc import Iterable

import numpy as np


class NgramBaselines:
    """A unigram and an interpolated bigram model over the pairs that a language model's loss is taken on.

    Both are smoothed so that no token has probability zero: the unigram by adding one to every count, the bigram by
    Witten-Bell interpolation with the unigram (Witten and Bell, 1991): after a token seen ``c`` times with ``t``
    different followers, the bigram has weight ``c / (c + t)``.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.tokens = 0
        self._unigrams = np.zeros(vocab_size, np.int64)
        self._pairs = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def count(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Count the predicted pairs of some sequences, ``(sequences, sequence_length)``; -100 labels are no targets."""
        previous, target = _pairs(tokens, labels)
        self.tokens += target.size
        self._unigrams += np.bincount(target, minlength=self.vocab_size)
        pairs, counts = np.unique(previous * self.vocab_size + target, return_counts=True)
        merged, inverse = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        totals = np.zeros(merged.size, np.int64)
        np.add.at(totals, inverse, np.concatenate([self._counts, counts]))
        self._pairs, self._counts = merged, totals

    def losses(self, sequences: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
        """Mean loss in nats of the unigram and of the bigram model over ``(tokens, labels)`` arrays."""
        unigram = (self._unigrams + 1) / (self.tokens + self.vocab_size)
        contexts = self._pairs // self.vocab_size
        seen = np.bincount(contexts, weights=self._counts, minlength=self.vocab_size)
        followers = np.bincount(contexts, minlength=self.vocab_size)
        sums, total = np.zeros(2), 0
        for tokens, labels in sequences:
            previous, target = _pairs(tokens, labels)
            backoff = unigram[target]
            pair_counts = self._lookup(previous * self.vocab_size + target)
            denominator = seen[previous] + followers[previous]
            known = denominator > 0
            interpolated = backoff.copy()
            interpolated[known] = (pair_counts[known] + followers[previous][known] * backoff[known]) / denominator[
                known
            ]
            sums -= np.log(backoff).sum(), np.log(interpolated).sum()
            total += target.size
        return tuple((sums / max(total, 1)).tolist())

    def _lookup(self, pairs: np.ndarray) -> np.ndarray:
        if self._pairs.size == 0:
            return np.zeros(pairs.size, np.int64)
        places = np.minimum(np.searchsorted(self._pairs, pairs), self._pairs.size - 1)
        return np.where(self._pairs[places] == pairs, self._counts[places], 0)


def _pairs(tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted = labels[:, 1:] != -100
    return tokens[:, :-1][predicted].astype(np.int64), tokens[:, 1:][predicted].astype(np.int64)
