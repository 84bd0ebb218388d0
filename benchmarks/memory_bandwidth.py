"""What this machine's memory delivers, and how much of that a decoder uses."""

import time
from pathlib import Path

import torch


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux tells of; 0 where it tells of none."""
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=0)


def read_bandwidth(reads: int = 7) -> float:
    """Bytes per second of the best of several sums over 1 GB, or over four times the last-level cache if that is more.

    The sum runs on torch's threads, as many as every decoder here is given. Nothing is left in a cache from one read to
    the next, since they read in the same order.
    """
    data = torch.ones(max(2**30, 4 * last_level_cache()) // 4)
    seconds = []
    for _ in range(reads):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return data.numel() * data.element_size() / min(seconds)
