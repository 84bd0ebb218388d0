"""Join and leave process groups within one process, as often as the set of workers changes."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join(rank: int, world_size: int, local_rank: int, address: tuple[str, int], device: torch.device) -> None:
    """Join a group: NCCL between GPUs, gloo between CPUs.

    Args:
        local_rank: among the group's processes on this machine.
        address: host and port that rank 0 listens at.

    Raises:
        RuntimeError: not all ranks came within a minute, or the connection broke.
    """
    host, port = address
    os.environ |= {  # DeepSpeed reads them
        "RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": host, "MASTER_PORT": str(port),
    }  # fmt: skip
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=60))
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A peer that dies closes its connections, which ends a collective at once; one that hangs is the coordinator's
    # matter. The long timeout lets a much slower peer be waited for.
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1),
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
