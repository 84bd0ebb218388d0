"""Who takes which units of a step: pure arithmetic, no Ray and no torch."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import accumulate, islice, pairwise
from math import ceil, isfinite
from typing import Any

SLACK = 0.02
"""Part of the step time that is given up for fewer micro-batches, whose own fixed cost no plan knows."""


@dataclass(frozen=True)
class Shares:
    """How the units of one step, or of one evaluation, are shared out to the workers.

    Args:
        micro_batches: for every worker in rank order, the sizes of its micro-batches in units. A 0 is an empty one that
            only fills up; a worker without units has none at all where workers need not have equally many.
        equal_micro_batches: whether the workers wait for each other in every micro-batch, not only at the step's end.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    equal_micro_batches: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Units of every worker."""
        return tuple(sum(sizes) for sizes in self.micro_batches)

    def ranges(self, first_unit: int) -> list[range]:
        """Every worker's contiguous slice, in rank order, of the units that begin with ``first_unit``."""
        return [range(*ends) for ends in pairwise(accumulate(self.counts, initial=first_unit))]

    def pieces(self, rank: int, batch: Any) -> Iterator[Any]:
        """The micro-batches of a worker's ``batch``, which slices by units."""
        sizes = self.micro_batches[rank]
        return (batch[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))

    def seconds(self, speeds: Sequence[float]) -> float:
        """The time that the slowest worker takes, with ``speeds`` in units per second."""
        meetings: Iterable[tuple[int, ...]] = [self.counts]
        if self.equal_micro_batches:
            meetings = zip(*self.micro_batches, strict=True)
        return sum(max(size / speed for size, speed in zip(sizes, speeds, strict=True)) for sizes in meetings)


def plan_shares(
    global_batch_size: int, speeds: Sequence[float], limits: Sequence[int], equal_micro_batches: bool = False
) -> Shares:
    """Share out a step so that all workers finish together, as nearly as whole units allow.

    With unequal numbers of micro-batches the predicted time is exactly the smallest possible one: memory limits cut a
    worker's share into more micro-batches, but do not bound it. With equal numbers the time is the sum over
    micro-batches of the slowest worker's part; all micro-batches but the last have the same size, and the predicted
    time exceeds the smallest possible one by less than a micro-batch and ``SLACK``. Of equal choices, the lower rank
    takes the unit.

    Args:
        global_batch_size: units to share out.
        speeds: of every worker, in units per second; only their ratios matter.
        limits: the largest micro-batch of every worker, in units.
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


def fit_to_costs(shares: Shares, costs: Sequence[float], limits: Sequence[int]) -> tuple[Shares, list[float]]:
    """Move the borders between the workers' slices where units differ in cost.

    Each worker's part of the step's cost becomes as near as whole units allow to its part of the units in ``shares``;
    a worker without units stays without. Units of equal cost leave the shares as they are.

    Args:
        shares: planned for units of equal cost.
        costs: of the step's units, in their order; positive.
        limits: the largest micro-batch of every worker, in units.

    Returns:
        The shares, and the cost of every worker's slice.
    """
    counts, total = shares.counts, sum(costs)
    if all(cost == costs[0] for cost in costs):
        return shares, [count * costs[0] for count in counts]
    reached = list(accumulate(costs, initial=0.0))  # cost of the first n units
    borders = [0]
    for planned in accumulate(counts):
        target = total * planned / len(costs)
        after = bisect_left(reached, target, lo=borders[-1], hi=len(costs))
        nearer = after > borders[-1] and target - reached[after - 1] < reached[after] - target
        borders.append(after - nearer)
    borders[-1] = len(costs)
    fitted = [stop - start for start, stop in pairwise(borders)]
    parts = [ceil(count / limit) for count, limit in zip(fitted, limits, strict=True)]
    if shares.equal_micro_batches:
        parts = [max(parts)] * len(parts)
    work = [reached[stop] - reached[start] for start, stop in pairwise(borders)]
    micro_batches = tuple(_nearly_equal(count, number) for count, number in zip(fitted, parts, strict=True))
    return Shares(micro_batches, shares.equal_micro_batches), work


def _check(global_batch_size: int, speeds: Sequence[float], limits: Sequence[int]) -> None:
    if not speeds:
        raise ValueError("There is no worker to take a share.")
    if len(speeds) != len(limits):
        raise ValueError(f"There are {len(speeds)} speeds but {len(limits)} limits: give one of each for every worker.")
    if global_batch_size < 1:
        raise ValueError(f"A batch of {global_batch_size} units cannot be shared out: it needs one at least.")
    for rank, (speed, limit) in enumerate(zip(speeds, limits, strict=True)):
        if not (isfinite(speed) and speed > 0):
            raise ValueError(f"Worker {rank} has a speed of {speed} units per second: it must be positive.")
        if limit < 1:
            raise ValueError(f"Worker {rank} has a micro-batch limit of {limit}: it must hold one unit at least.")


def _taking(number: int, speeds: Sequence[float], limits: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Who takes the next unit while all work, each up to its limit: (seconds until it is done, rank).

    The first n entries share out n units in the least time, which is the n-th entry's.
    """

    def one(rank: int) -> Iterator[tuple[float, int]]:
        return ((size / speeds[rank], rank) for size in range(1, min(limits[rank], number) + 1))

    return islice(merge(*map(one, range(len(speeds)))), number)


def _nearly_equal(number: int, parts: int) -> tuple[int, ...]:
    size, larger = divmod(number, parts) if parts else (0, 0)
    return (size + 1,) * larger + (size,) * (parts - larger)
