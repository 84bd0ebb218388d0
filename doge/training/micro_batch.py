"""The largest micro-batch that fits a device's memory, found by running it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from doge.training.memory import fits, nothing_fits
from doge.training.micro_batch_cache import MicroBatchCache, micro_batch_circumstances

if TYPE_CHECKING:
    from doge.training.engine import Engine

MARGIN = 0.02
"""The part of the memory that the probe leaves free: later steps lay their tensors out a little differently."""


def find_micro_batch(try_step: Callable[[int], None], most: int) -> int:
    """The largest of 1 … ``most`` for which ``try_step`` fits, 0 where none does.

    Doubles until one does not fit, then halves the gap. ``try_step`` must leave nothing in memory where it succeeds.
    """
    largest, too_large = 0, most + 1
    while too_large - largest > 1:
        size = min(max(1, 2 * largest), most) if too_large > most else (largest + too_large) // 2
        if fits(lambda size=size: try_step(size)):
            largest = size
        else:
            too_large = size
    return largest


def probe_micro_batch(engine: "Engine", sequence_length: int, most: int, default: int, margin: float = MARGIN) -> int:
    """The largest micro-batch, in full sequences, whose forward and backward fit beside what the engine holds.

    Every rank may call it by itself at any time between steps: nothing is communicated, and weights, moments, counters
    and the state of the random numbers are afterwards what they were. See ``Engine.rehearse`` for what is run. The
    memory is limited meanwhile to 1 - ``margin`` of what this process has or could get.

    On a CPU nothing is probed, for its kernel kills a process instead of refusing it memory: ``default`` is the answer.

    Args:
        most: the largest size of use, such as the rank's share of the global batch.

    Raises:
        UserError: not even one sequence fits.
    """
    if engine.device.type != "cuda":
        return min(default, most)
    with _spare(engine.device, margin):
        largest = find_micro_batch(lambda size: engine.rehearse(size, sequence_length), most)
    if not largest:
        raise nothing_fits(engine.device)
    return largest


def micro_batch_size(
    engine: "Engine", sequence_length: int, most: int, default: int, cache: MicroBatchCache | None = None
) -> int:
    """``probe_micro_batch``, asked of the cache first and told to it afterwards."""
    if cache is None or engine.device.type != "cuda":
        return probe_micro_batch(engine, sequence_length, most, default)
    circumstances = micro_batch_circumstances(engine, sequence_length)
    size = cache.get(circumstances, most)
    if size is None:
        size = probe_micro_batch(engine, sequence_length, most, default)
        cache.put(circumstances, size, is_limit=size < most)
    return size


@contextmanager
def _spare(device: torch.device, margin: float) -> Iterator[None]:
    """Let the allocator refuse whatever would leave less than ``margin`` of the memory that this process can have."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((1 - margin) * available / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
