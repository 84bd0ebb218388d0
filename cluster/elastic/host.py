"""The process that trains in a seat: it keeps its imports, data and newest state while memberships come and go."""

import contextlib
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.elastic.membership import Given, HostInfo, Membership, Offer, Outcome
from cluster.runs.recipe import Recipe
from doge.common.lease import Claim
from doge.common.storage import Storage, StorageError

# A worker's step runs in a thread of its own, from whose arenas glibc returns large buffers to the kernel only to ask
# for them again, page by page: a fifth of a CPU step. The first three keep them. The fourth lets a thread sleep while
# it waits for the others of its step instead of taking the core that they need where the machine has other work too.
# The last ones leave GPUs to the seat that reserved them, and a broken NCCL group to the coordinator, instead of
# ending the process.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "OMP_WAIT_POLICY": "passive",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


@dataclass(frozen=True)
class HostConfig:
    """What the driver hands to every host.

    Args:
        recipe: of the run.
        storage: its root, which opens from any node.
        claim: that the run may commit: nobody else has taken it over.
        data_plan: fingerprint of the data's plan.
        start_from: a checkpoint of another run to begin with.
        use_gpu: whether a host trains on a GPU.
        board: the board's actor handle.
    """

    recipe: Recipe
    storage: Storage
    claim: Claim
    data_plan: str
    start_from: Storage | None
    use_gpu: bool
    board: Any


class Host:
    """The actor's class; `start_host` starts one. ``prepare``, ``offer`` and ``run`` follow one another in one thread,
    the other methods answer at any time."""

    def __init__(self, name: str):
        self.name = name
        self._worker: Any = None
        self._leave = threading.Event()

    @ray.method(concurrency_group="loop")
    def prepare(self, config: HostConfig) -> HostInfo:
        """Import everything, open the data, and do once what would make a first step slow."""
        if not config.use_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from cluster.workloads.worker import Worker

        self._worker = Worker(config, self.name, self._leave)
        self._worker.warm_up()
        return HostInfo(os.getpid(), socket.gethostname(), ray.util.get_node_ip_address())

    @ray.method(concurrency_group="loop")
    def offer(self, copies: bool) -> Offer:
        """The newest state that this host or the storage has; with ``copies`` also a reference to it for the others."""
        try:
            given = self._worker.starting_state()
        except StorageError as error:
            return Offer(trouble=str(error))
        if given is None:
            return Offer()
        return Offer(given.step, (ray.put(given),) if copies else ())

    @ray.method(concurrency_group="loop")
    def run(self, membership: Membership, rank: int, given: Given | None) -> Outcome:
        """Step in ``membership`` until it ends."""
        self._leave.clear()
        member = membership.members[rank]
        if member.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(member.gpus)
        return self._worker.run(membership, rank, given)

    @ray.method(concurrency_group="loop")
    def flush(self) -> None:
        """Return once the checkpoint that is being written is there."""
        self._worker.checkpoints.wait()

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """End the membership at the next step that all members can agree on."""
        self._leave.set()

    @ray.method(concurrency_group="control")
    def abort(self, number: int) -> None:
        """Let a member of the membership ``number``, which has lost one, end it where it does not notice by itself."""
        self._worker.abort(number)

    @ray.method(concurrency_group="control")
    def address(self) -> tuple[str, int]:
        """Where this host would listen as rank 0."""
        from doge.training import process_group

        return process_group.free_address(ray.util.get_node_ip_address())

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """Step, phase and seconds since it began; an answer at all says that the process is alive."""
        if self._worker is None:
            return {"phase": "start", "step": 0, "seconds": 0.0, "waiting": False}
        (phase, step, since), held = self._worker.phase, self._worker.held
        return {
            "phase": phase,
            "step": step,
            "seconds": time.monotonic() - since,
            "waiting": self._worker.waiting,
            "step_seconds": self._worker.step_seconds,
            "membership": self._worker.membership_number,
            "held": held[0].step if held else -1,
        }


def start_host(name: str, node: str):
    """Start a host on a node, without resources: those are its seat's. Returns the actor's handle."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"loop": 1, "control": 8})(Host)
        .options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": ENVIRONMENT},
        )
        .remote(name)
    )


def kill_host(handle, node: str, pid: int | None) -> None:
    """End a host; with its process's ``pid``, also one that is stopped, by a task on its node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with contextlib.suppress(Exception):
        ray.kill(handle)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    if pid is not None:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
