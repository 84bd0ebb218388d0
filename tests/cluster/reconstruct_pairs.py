"""An objective of the tests' own: pairs of sequences of unequal length, whose masked tokens are reconstructed.

Its unit is a pair, units differ in cost, and the mean is over pairs; it is like nothing that pretraining does.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data_pipelines.order.feed import ReadAhead
from doge.common.errors import MachineError
from doge.training.objective import LossSum

VOCABULARY, WIDTH, MASK = 20, 8, 0
Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Pairs:
    """Consecutive pairs: units of the feed, and batches of the objective. ``weighed`` is False for a filler."""

    pairs: tuple[Pair, ...]
    samples: list[tuple[int, int]]
    weighed: bool = True

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, part: slice) -> "Pairs":
        return Pairs(self.pairs[part], self.samples[part])

    def to(self, device: torch.device) -> "Pairs":
        return self


@dataclass(frozen=True)
class PairFeed:
    """Pairs drawn by a hash of (name, number): the config and the feed in one."""

    name: str
    length: None = None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def open(self, storage, on_wait, on_trouble) -> "PairFeed":
        return self

    def pair(self, unit: int) -> Pair:
        chance = random.Random(f"{self.name}/{unit}")
        lengths = chance.randint(2, 5), chance.randint(2, 30)
        return tuple(tuple(chance.randrange(1, VOCABULARY) for _ in range(length)) for length in lengths)

    def read(self, start: int, stop: int, stopped=None) -> Pairs:
        numbers = range(start, stop)
        return Pairs(tuple(map(self.pair, numbers)), [(unit, len(self.pair(unit)[1])) for unit in numbers])

    def prefetch(self, ranges: Iterable[tuple[int, int]], depth: int = 2) -> ReadAhead:
        return ReadAhead(self.read, ranges, depth)

    def cost(self, unit: int) -> float:
        return sum(map(len, self.pair(unit))) / 20


class Reconstruction(nn.Module):
    """Tokens from their own embedding, which may be the mask's, and the mean embedding of both sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, masked: torch.Tensor) -> torch.Tensor:
        states = self.embed(masked)
        context = states.mean(0, keepdim=True).expand_as(states)
        return self.head(torch.tanh(self.mix(torch.cat([states, context], -1))))


@dataclass(frozen=True)
class ReconstructPairs:
    """Mean over pairs of each pair's mean cross-entropy over its masked tokens.

    Args:
        trained: regular expression of the parameters that are trained.
        pause: seconds that every step takes longer, so that something can happen to it.
        gate: path of a file; no step begins while it is there.
        misfortunes: path of a directory; a file there befalls whoever takes it, as its name says.
    """

    trained: str = ""
    pause: float = 0.0
    gate: str = ""
    misfortunes: str = ""

    @property
    def metrics(self) -> Sequence[str]:
        return ("masked_tokens",)

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        return Reconstruction()

    def trainable(self, name: str) -> bool:
        return re.search(self.trained, name) is not None

    def prepare(self, model: nn.Module, units: Pairs, seeds: Iterable[int]) -> Pairs:
        time.sleep(self.pause)
        while self.gate and os.path.exists(self.gate):
            time.sleep(0.01)
        masked = [tuple(mask(tokens, seed) for tokens in pair) for pair, seed in zip(units.pairs, seeds, strict=True)]
        return Pairs(tuple(zip(units.pairs, masked, strict=True)), units.samples)

    def weight(self, batch: Pairs) -> int:
        return len(batch) if batch.weighed else 0

    def flops(self, batch: Pairs) -> float:
        return 0.0

    def loss_sum(self, model: nn.Module, batch: Pairs) -> LossSum:
        if self.misfortunes:
            befall(self.misfortunes)
        losses, number = [], torch.zeros(())
        for pair, masked in batch.pairs:
            tokens, seen = torch.tensor(pair[0] + pair[1]), torch.tensor(masked[0] + masked[1])
            hidden = seen == MASK
            losses.append(F.cross_entropy(model(seen)[hidden], tokens[hidden]))
            number += hidden.sum()
        total = torch.stack(losses).sum()
        return LossSum(
            total if batch.weighed else 0 * total, {"masked_tokens": number if batch.weighed else 0 * number}
        )

    def rehearsal(self, units: int, length: int) -> Pairs:
        pair = ((1,) * length, (1,) * length)
        return Pairs(((pair, ((MASK,) * length,) * 2),) * units, [(0, 0)] * units)

    def empty(self) -> Pairs:
        return Pairs(((((1,), (1,)), ((MASK,), (MASK,))),), [(0, 0)], weighed=False)


def mask(tokens: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """The first token and, by the seed, every third or so of the others are hidden."""
    chance = random.Random(seed)
    return (MASK, *(MASK if chance.random() < 1 / 3 else token for token in tokens[1:]))


def befall(folder: str) -> None:
    """Let the first misfortune that lies there befall this process, and no other one."""
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            os.remove(f"{folder}/{name}")
            if name == "hang":
                time.sleep(600)
            raise MachineError("Its fan is broken.") if name == "unable" else RuntimeError("a fault of this process")
