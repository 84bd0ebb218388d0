"""N-gram baselines that a model must beat, counted on the tokens that it was trained on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
TokenArrays = Iterable[tuple[Ints, Ints]]
"""``(tokens, labels)`` arrays, each of shape (sequences, sequence_length)."""


@dataclass(frozen=True)
class Baselines:
    """Mean losses, in nats per token, of the baselines over held-out sequences.

    Args:
        tokens: Number of training targets that both models were counted on.
    """

    unigram: float
    bigram: float
    tokens: int


def measure_baselines(vocab_size: int, training: TokenArrays, held_out: TokenArrays) -> Baselines:
    """Count both models on the training sequences and measure their losses on the held-out ones."""
    ngrams = NgramBaselines(vocab_size)
    for tokens, labels in training:
        ngrams.count(tokens, labels)
    unigram, bigram = ngrams.losses(held_out)
    return Baselines(unigram, bigram, ngrams.tokens)


class NgramBaselines:
    """A unigram and an interpolated bigram model over the pairs of tokens that a language model's loss covers.

    Both are smoothed so that no token has probability zero: the unigram by adding one to every count, the bigram by
    Witten-Bell interpolation with the unigram (Witten and Bell, 1991): after a token that was seen ``c`` times with
    ``t`` different followers, the bigram has weight ``c / (c + t)``.

    Args:
        vocab_size: Number of token ids.

    Attributes:
        tokens: Number of targets counted so far.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokens = 0
        self._unigrams = np.zeros(vocab_size, np.int64)
        self._pairs = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def count(self, tokens: Ints, labels: Ints) -> None:
        """Count the pairs in arrays (sequences, sequence_length); a label of -100 is no target."""
        previous, target = _pairs(tokens, labels)
        self.tokens += target.size
        self._unigrams += np.bincount(target, minlength=self.vocab_size)
        pairs, counts = np.unique(previous * self.vocab_size + target, return_counts=True)
        merged, inverse = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        totals = np.zeros(merged.size, np.int64)
        np.add.at(totals, inverse, np.concatenate([self._counts, counts]))
        self._pairs, self._counts = merged, totals

    def losses(self, sequences: TokenArrays) -> tuple[float, float]:
        """Mean losses, in nats per token, of the unigram and the bigram model over ``(tokens, labels)`` arrays."""
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
            mass = pair_counts[known] + followers[previous][known] * backoff[known]
            interpolated[known] = mass / denominator[known]
            sums -= np.log(backoff).sum(), np.log(interpolated).sum()
            total += target.size
        unigram_loss, bigram_loss = (sums / max(total, 1)).tolist()
        return unigram_loss, bigram_loss

    def _lookup(self, pairs: Ints) -> Ints:
        """How often each pair was counted."""
        if self._pairs.size == 0:
            return np.zeros(pairs.size, np.int64)
        places = np.minimum(np.searchsorted(self._pairs, pairs), self._pairs.size - 1)
        return np.where(self._pairs[places] == pairs, self._counts[places], 0)


def _pairs(tokens: Ints, labels: Ints) -> tuple[Ints, Ints]:
    """The targets that count, and the token before each."""
    predicted = labels[:, 1:] != -100
    return tokens[:, :-1][predicted].astype(np.int64), tokens[:, 1:][predicted].astype(np.int64)
