"""The largest micro-batch that fits a device's memory, found by running it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from doge.training.memory import fits, nothing_fits
from doge.training.micro_batch_cache import MicroBatchCache, micro_batch_circumstances

if TYPE_CHECKING:
    from doge.training.engine import Engine

OTHERS = 0.08
"""Part of a GPU's memory that contexts and displays may hold before the GPU counts as shared."""
MARGIN = 0.02
"""Part of the memory that the probe leaves free, since later steps lay their tensors out a little differently."""


def find_micro_batch(try_step: Callable[[int], None], most: int) -> int:
    """Find the largest of 1 … ``most`` for which ``try_step`` fits in memory; 0 if none does.

    Doubles until one does not fit, then halves the gap. ``try_step`` must leave nothing in memory when it succeeds.
    """
    largest, too_large = 0, most + 1
    while too_large - largest > 1:
        size = min(max(1, 2 * largest), most) if too_large > most else (largest + too_large) // 2
        if fits(partial(try_step, size)):
            largest = size
        else:
            too_large = size
    return largest


def probe_micro_batch(engine: "Engine", length: int, most: int, default: int, margin: float = MARGIN) -> int:
    """Find the largest micro-batch, in units, whose forward and backward pass fit beside what the engine holds.

    Every rank may call it by itself at any time between steps: nothing is communicated, and weights, moments, counters
    and random states do not change. See ``Engine.rehearse`` for what is run. Meanwhile the memory is limited to
    1 - ``margin`` of what this process has or could get.

    On a CPU nothing is probed, since Linux kills a process instead of refusing it memory; it returns ``default``.

    Args:
        length: Tokens of the longest unit.
        most: The largest useful size, such as the rank's share of the global batch.
        default: The size on a CPU.

    Raises:
        UserError: Not even one unit fits.
    """
    if engine.device.type != "cuda":
        return min(default, most)
    with _spare(engine.device, margin):
        largest = find_micro_batch(lambda size: engine.rehearse(size, length), most)
    if not largest:
        raise nothing_fits(engine.device)
    return largest


def micro_batch_size(
    engine: "Engine", length: int, most: int, default: int, cache: MicroBatchCache | None = None
) -> int:
    """Look the micro-batch up in the cache, or probe it, and add it to the cache where nobody else used the GPU."""
    if cache is None or engine.device.type != "cuda":
        return probe_micro_batch(engine, length, most, default)
    circumstances = micro_batch_circumstances(engine, length)
    size = cache.get(circumstances, most)
    if size is None:
        shared = _shared(engine.device)
        size = probe_micro_batch(engine, length, most, default)
        if not shared:  # a passing tenant's memory says nothing of other GPUs, or of this one later
            cache.put(circumstances, size, is_limit=size < most)
    return size


def _shared(device: torch.device) -> bool:
    """Whether other processes hold memory of the device, beyond the contexts that drivers keep there."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) < (1 - OTHERS) * total


@contextmanager
def _spare(device: torch.device, margin: float) -> Iterator[None]:
    """Make the allocator refuse what would leave less than ``margin`` of the memory that this process can have."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((1 - margin) * available / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
