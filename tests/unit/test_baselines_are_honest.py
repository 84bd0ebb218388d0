from collections import Counter
from math import log

import numpy as np
import pytest

from doge.evaluation.ngrams import NgramBaselines


def sequences(seed: int, rows: int = 20, width: int = 30, vocabulary: int = 12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, width)) * rng.integers(0, 2, (rows, width))
    labels = np.where(rng.random((rows, width)) < 0.1, -100, tokens)
    labels[:, 0] = -100
    return tokens, labels


def by_definition(training, held_out, vocabulary: int) -> tuple[float, float]:
    pairs = Counter()
    for tokens, labels in training:
        for row, targets in zip(tokens, labels, strict=True):
            pairs.update((int(a), int(b)) for a, b, t in zip(row, row[1:], targets[1:], strict=False) if t != -100)
    targets, contexts, followers = Counter(), Counter(), Counter()
    for (a, b), count in pairs.items():
        targets[b] += count
        contexts[a] += count
        followers[a] += 1
    total, losses, scored = sum(targets.values()), [0.0, 0.0], 0
    for row, labels in zip(*held_out, strict=True):
        for a, b, target in zip(row, row[1:], labels[1:], strict=False):
            if target == -100:
                continue
            unigram = (targets[b] + 1) / (total + vocabulary)
            weight = contexts[a] / (contexts[a] + followers[a]) if contexts[a] else 0.0
            bigram = weight * (pairs[a, b] / contexts[a] if contexts[a] else 0.0) + (1 - weight) * unigram
            losses[0] -= log(unigram)
            losses[1] -= log(bigram)
            scored += 1
    return losses[0] / scored, losses[1] / scored


def test_they_equal_their_definitions():
    training, held_out = [sequences(0), sequences(1)], sequences(2)
    baselines = NgramBaselines(12)
    for tokens, labels in training:
        baselines.count(tokens, labels)
    assert baselines.losses([held_out]) == pytest.approx(by_definition(training, held_out, 12), rel=1e-12)
    assert baselines.tokens == sum(int((labels[:, 1:] != -100).sum()) for _, labels in training)


def test_probabilities_sum_to_one_after_any_token():
    baselines = NgramBaselines(12)
    baselines.count(*sequences(0))
    for previous in range(12):
        row = np.array([[previous, following] for following in range(12)])
        labels = row.copy()
        labels[:, 0] = -100
        for model in (0, 1):
            losses = [baselines.losses([(row[i : i + 1], labels[i : i + 1])])[model] for i in range(12)]
            assert np.exp(-np.array(losses)).sum() == pytest.approx(1.0)


def test_the_bigram_model_learns_what_the_unigram_cannot():
    tokens = np.tile(np.arange(10), (5, 4))
    labels = tokens.copy()
    labels[:, 0] = -100
    baselines = NgramBaselines(10)
    baselines.count(tokens, labels)
    unigram, bigram = baselines.losses([(tokens, labels)])
    assert unigram == pytest.approx(log(10), rel=0.01)
    assert bigram < 0.2
