"""Running out of memory: told apart from other errors, and cleaned up after."""

import gc
from collections.abc import Callable

import torch

from doge.common.errors import MachineError
from doge.common.hardware import device_name

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(Exception):
    """A step did not fit in memory, and this rank cannot repeat it by itself.

    The engine that raised it is unusable: its peers may have gone on, or wait in a collective.

    Args:
        limit: The largest micro-batch, in units, that this rank should be given from now on.
    """

    def __init__(self, limit: int):
        super().__init__(f"out of memory: at most {limit} sequences a micro-batch from now on")
        self.limit = limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused memory: CUDA's, cuBLAS's for its workspace, or the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fits(work: Callable[[], object]) -> bool:
    """Run ``work``; False if it ran out of memory, and then everything that it allocated is free again."""
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here the error is gone, and with its traceback the frames that held the tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


class NothingFits(MachineError):
    """Not even one unit fits on this device."""


def nothing_fits(device: torch.device) -> NothingFits:
    return NothingFits(
        f"Not even one sequence fits in the memory of {device_name(device)}: choose "
        "--training.gradient-checkpointing, a shorter --data.sequence-length, a higher --engine.zero-stage (with "
        "several workers), or a GPU with more memory."
    )
