"""Who takes which sequences of a step: pure arithmetic, no Ray and no torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import accumulate, islice, pairwise
from math import ceil, isfinite

SLACK = 0.02
"""Part of the step time that is given up for fewer micro-batches, whose own fixed cost no plan knows."""


@dataclass(frozen=True)
class Shares:
    """How the sequences of one step, or of one evaluation, are shared out to the workers.

    Args:
        micro_batches: for every worker in rank order, the sizes of its micro-batches in sequences. A 0 is an empty one
            that only fills up; a worker without sequences has none at all where workers need not have equally many.
        equal_micro_batches: whether the workers wait for each other in every micro-batch, not only at the step's end.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    equal_micro_batches: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Sequences of every worker."""
        return tuple(sum(sizes) for sizes in self.micro_batches)

    def ranges(self, first_sequence: int) -> list[range]:
        """Every worker's contiguous slice, in rank order, of the sequences that begin with ``first_sequence``."""
        return [range(*ends) for ends in pairwise(accumulate(self.counts, initial=first_sequence))]

    def seconds(self, speeds: Sequence[float]) -> float:
        """The time that the slowest worker takes, with ``speeds`` in sequences per second."""
        meetings = zip(*self.micro_batches, strict=True) if self.equal_micro_batches else [self.counts]
        return sum(max(size / speed for size, speed in zip(sizes, speeds, strict=True)) for sizes in meetings)


def plan_shares(
    global_batch_size: int, speeds: Sequence[float], limits: Sequence[int], equal_micro_batches: bool = False
) -> Shares:
    """Share out a step so that all workers finish together, as nearly as whole sequences allow.

    With unequal numbers of micro-batches the predicted time is exactly the smallest possible one: memory limits cut a
    worker's share into more micro-batches, but do not bound it. With equal numbers the time is the sum over
    micro-batches of the slowest worker's part; all micro-batches but the last have the same size, and the predicted
    time exceeds the smallest possible one by less than a micro-batch and ``SLACK``. Of equal choices, the lower rank
    takes the sequence.

    Args:
        global_batch_size: sequences to share out.
        speeds: of every worker, in sequences per second; only their ratios matter.
        limits: the largest micro-batch of every worker, in sequences.
        equal_micro_batches: every worker gets as many micro-batches, empty ones included (ZeRO 2 and 3).

    Raises:
        ValueError: there is nothing to share out or no worker, or a speed or a limit is none.
    """
    _check(global_batch_size, speeds, limits)
    workers = range(len(speeds))
    if not equal_micro_batches:
        taken = Counter(rank for _, rank in _taking(global_batch_size, speeds, [global_batch_size] * len(speeds)))
        return Shares(tuple(_nearly_equal(taken[rank], ceil(taken[rank] / limits[rank])) for rank in workers))
    order = list(_taking(global_batch_size, speeds, limits))  # its first n entries are the best micro-batch of size n
    choices = []
    for size in range(1, len(order) + 1):
        whole, rest = divmod(global_batch_size, size)
        seconds = whole * order[size - 1][0] + (order[rest - 1][0] if rest else 0.0)
        choices.append((whole + (rest > 0), seconds, size))
    fastest = min(seconds for _, seconds, _ in choices)
    *_, size = min(choice for choice in choices if choice[1] <= fastest * (1 + SLACK))
    whole, rest = divmod(global_batch_size, size)
    parts = [Counter(rank for _, rank in order[:part]) for part in [size] * whole + [rest] * (rest > 0)]
    return Shares(tuple(tuple(part[rank] for part in parts) for rank in workers), equal_micro_batches=True)


def _check(global_batch_size: int, speeds: Sequence[float], limits: Sequence[int]) -> None:
    if not speeds:
        raise ValueError("There is no worker to take a share.")
    if len(speeds) != len(limits):
        raise ValueError(f"There are {len(speeds)} speeds but {len(limits)} limits: give one of each for every worker.")
    if global_batch_size < 1:
        raise ValueError(f"A batch of {global_batch_size} sequences cannot be shared out: it needs one at least.")
    for rank, (speed, limit) in enumerate(zip(speeds, limits, strict=True)):
        if not (isfinite(speed) and speed > 0):
            raise ValueError(f"Worker {rank} has a speed of {speed} sequences per second: it must be positive.")
        if limit < 1:
            raise ValueError(f"Worker {rank} has a micro-batch limit of {limit}: it must hold one sequence at least.")


def _taking(number: int, speeds: Sequence[float], limits: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Who takes the next sequence while all work, each up to its limit: (seconds until it is done, rank).

    The first n entries share out n sequences in the least time, which is the n-th entry's.
    """

    def one(rank: int) -> Iterator[tuple[float, int]]:
        return ((size / speeds[rank], rank) for size in range(1, min(limits[rank], number) + 1))

    return islice(merge(*map(one, range(len(speeds)))), number)


def _nearly_equal(number: int, parts: int) -> tuple[int, ...]:
    size, larger = divmod(number, parts) if parts else (0, 0)
    return (size + 1,) * larger + (size,) * (parts - larger)
