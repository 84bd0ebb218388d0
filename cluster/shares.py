"""Who takes which sequences of a step: pure arithmetic, no Ray and no torch."""

from itertools import pairwise
from math import ceil


def split_evenly(sequences: range, workers: int) -> list[range]:
    """Contiguous shares of a step's sequences, whose sizes differ by at most one.

    Raises:
        ValueError: there is not a sequence for every worker.
    """
    if len(sequences) < workers:
        raise ValueError(f"{len(sequences)} sequences cannot be shared out to {workers} workers")
    return _cut(sequences, workers)


def micro_batches(share: range, micro_batch_size: int, number: int | None = None) -> list[range]:
    """Cut a worker's share into micro-batches of nearly equal sizes, none above ``micro_batch_size``.

    Args:
        number: how many; as few as will do by default. More than the share has sequences leaves some empty.
    """
    fewest = ceil(len(share) / micro_batch_size)
    number = fewest if number is None else number
    if number < fewest:
        raise ValueError(f"{len(share)} sequences do not fit in {number} micro-batches of {micro_batch_size}")
    return _cut(share, number)


def equal_number(shares: list[range], micro_batch_size: int) -> int:
    """The number of micro-batches that every worker can cut its share into."""
    return max(ceil(len(share) / micro_batch_size) for share in shares)


def _cut(whole: range, parts: int) -> list[range]:
    size, larger = divmod(len(whole), parts) if parts else (0, 0)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return [whole[start:stop] for start, stop in pairwise(starts)]
