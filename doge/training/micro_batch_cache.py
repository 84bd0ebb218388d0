"""A cache of micro-batch sizes, keyed by everything that decides them."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from doge.common.hardware import device_name
from doge.common.storage import Storage

if TYPE_CHECKING:
    from doge.training.engine import Engine


class MicroBatchCache:
    """Micro-batch sizes found before, one small JSON file for each set of circumstances.

    Args:
        storage: where, such as ``Storage(root) / "micro_batches"``; ranks may write at the same time.
    """

    def __init__(self, storage: Storage):
        self._storage = storage

    def get(self, circumstances: dict[str, Any], most: int) -> int | None:
        """The micro-batch to take if at most ``most`` units are useful; None if it must be probed."""
        try:
            found = json.loads(self._storage.read_bytes(_file_name(circumstances)))
            size, is_limit = int(found["micro_batch"]), bool(found["is_limit"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return min(size, most) if is_limit or most <= size else None

    def put(self, circumstances: dict[str, Any], micro_batch: int, is_limit: bool) -> None:
        """Remember a size.

        Args:
            is_limit: Whether larger ones are known not to fit, rather than only useless to the rank that probed.
        """
        content = {"micro_batch": micro_batch, "is_limit": is_limit} | circumstances
        self._storage.write_bytes(_file_name(circumstances), json.dumps(content, indent=2).encode())


def micro_batch_circumstances(engine: "Engine", sequence_length: int) -> dict[str, Any]:
    """Everything that decides how large a micro-batch fits: the key of ``MicroBatchCache``."""
    device, module = engine.device, engine.module
    config: Any = getattr(module, "config", None)
    is_gpu = device.type == "cuda"
    partitioned = engine.replicas is None and engine.zero_stage > 0
    return {
        "device": device_name(device),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
        "model": _digest(repr(module) if config is None else config.to_dict()),  # the version of transformers included
        "objective": type(engine.objective).__name__,
        "sequence_length": sequence_length,
        "precision": str(engine.dtype).removeprefix("torch."),
        "compiled": engine.compiled,
        "zero_stage": engine.zero_stage,
        "world_size": engine.world_size if partitioned else 1,
        "gradient_checkpointing": bool(getattr(module, "is_gradient_checkpointing", False)),
    }


def _file_name(circumstances: dict[str, Any]) -> str:
    return f"{_digest(circumstances)}.json"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
