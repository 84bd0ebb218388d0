"""How large a micro-batch fits: out-of-memory errors told apart and cleaned up after, the search, and its memory."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from doge.common.errors import UserError
from doge.common.hardware import device_name

if TYPE_CHECKING:
    from doge.common.storage import Storage
    from doge.training.engine import Engine

MARGIN = 0.02
"""The part of the memory that the probe leaves free: later steps lay their tensors out a little differently."""

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(Exception):
    """A step that this rank cannot repeat by itself did not fit.

    The engine that raised it is of no more use: its peers may have gone on, or wait in a collective.

    Args:
        limit: the largest micro-batch, in sequences, that this rank should be given from now on.
    """

    def __init__(self, limit: int):
        super().__init__(f"out of memory: at most {limit} sequences a micro-batch from now on")
        self.limit = limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: CUDA's, cuBLAS's for its workspace, or the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fits(work: Callable[[], object]) -> bool:
    """Whether ``work`` runs without running out of memory; if it does not, all that it allocated is free again."""
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here is the error gone, and with its traceback the frames that held the tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def nothing_fits(device: torch.device) -> UserError:
    return UserError(
        f"Not even one sequence fits in the memory of {device_name(device)}: choose "
        "--training.gradient-checkpointing, a shorter --data.sequence-length, a higher --engine.zero-stage (with "
        "several workers), or a GPU with more memory."
    )


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


class MicroBatchCache:
    """Micro-batches found before, one small JSON file for each set of circumstances.

    Args:
        storage: where, such as ``Storage(root) / "micro_batches"``; ranks may write at the same time.
    """

    def __init__(self, storage: "Storage"):
        self._storage = storage

    def get(self, circumstances: dict[str, Any], most: int) -> int | None:
        """The micro-batch to take where at most ``most`` sequences are of use; None where it must be probed."""
        try:
            found = json.loads(self._storage.read_bytes(_file_name(circumstances)))
            size, is_limit = int(found["micro_batch"]), bool(found["is_limit"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return min(size, most) if is_limit or most <= size else None

    def put(self, circumstances: dict[str, Any], micro_batch: int, is_limit: bool) -> None:
        """Remember a size.

        Args:
            is_limit: whether larger ones are known not to fit, and not only of no use to the one who probed.
        """
        content = {"micro_batch": micro_batch, "is_limit": is_limit} | circumstances
        self._storage.write_bytes(_file_name(circumstances), json.dumps(content, indent=2).encode())


def micro_batch_circumstances(engine: "Engine", sequence_length: int) -> dict[str, Any]:
    """All that decides how large a micro-batch fits: the key of ``MicroBatchCache``."""
    device, config = engine.device, engine.module.config
    is_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
        "model": _digest(config.to_dict()),  # the version of transformers included
        "sequence_length": sequence_length,
        "precision": str(engine.dtype).removeprefix("torch."),
        "compiled": engine.compiled,
        "zero_stage": engine.zero_stage,
        "world_size": engine.world_size if engine.zero_stage else 1,  # states are partitioned over it
        "gradient_checkpointing": bool(engine.module.is_gradient_checkpointing),
    }


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


def _file_name(circumstances: dict[str, Any]) -> str:
    return f"{_digest(circumstances)}.json"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
