"""The process group that DeepSpeed sees: this process alone, or all workers where the state is partitioned.

It is joined and left within one process, as often as the set of workers changes.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def be_alone(device: torch.device) -> None:
    """Be a group of one, which needs no network. Does nothing in such a group."""
    if not (dist.is_initialized() and dist.get_world_size() == 1 and dist.get_backend() == _backend(device)):
        if "deepspeed" in sys.modules:  # whose memory of an earlier group must go too
            leave()
        join(0, 1, dist.HashStore(), device)


def join(rank: int, world_size: int, store: dist.Store, device: torch.device) -> None:
    """Join a group: NCCL between GPUs, gloo between CPUs.

    Args:
        store: through which the ranks find each other.

    Raises:
        RuntimeError: not all ranks came, or the connection broke.
    """
    os.environ |= {  # DeepSpeed reads them; a process sees one GPU at most, whichever of its machine that is
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    # A peer that dies closes its connections, which ends a collective at once; one that hangs is the coordinator's
    # matter. The long timeout lets a much slower peer be waited for.
    dist.init_process_group(
        _backend(device), store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1),
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip


def leave() -> None:
    """Leave the group and make DeepSpeed forget it. Does nothing outside of a group.

    Abort a broken group of GPUs first: leaving waits for its collectives.
    """
    import deepspeed.comm.comm as deepspeed_comm

    if deepspeed_comm.cdb is not None:
        from deepspeed.utils import groups

        groups._release_process_group_references()
        deepspeed_comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


def abort() -> None:
    """Abort NCCL's collectives, also those in which another thread waits; gloo's end when a connection closes."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
