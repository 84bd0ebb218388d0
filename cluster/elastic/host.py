"""A host: the process in a seat, whose workload keeps its imports, data and newest state while memberships change."""

import contextlib
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.elastic.decisions.commands import Copy
from cluster.elastic.membership import HostInfo, Membership, Offer, Outcome, Process
from cluster.elastic.workload import Beat, Job, Workload
from doge.common.machine import cores_id, process_start, step_aside, wait_until_gone
from doge.common.network import free_address
from doge.common.storage import StorageError

# A worker's step runs in a thread of its own, from whose arenas glibc returns large buffers to the kernel only to ask
# for them again, page by page: a fifth of a CPU step. The first three keep them. The fourth lets a thread look for the
# others of its step for some tens of microseconds before it sleeps. Where the machine has other work too, the
# milliseconds that are libgomp's own choice take the core that the others need: six times the step. To sleep at once
# costs a tenth of the step or more where it has none.
# The last ones leave GPUs to the seat that reserved them, and a broken NCCL group to the coordinator, instead of
# ending the process.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "GOMP_SPINCOUNT": "10000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}

GONE_SECONDS = 20.0  # that a killed process may take to give back its GPU


class Host:
    """The actor's class; `start_host` starts one.

    ``prepare``, ``offer``, ``run``, ``commit`` and ``flush`` are called one after another in one thread. The other
    methods answer at any time.
    """

    def __init__(self, name: str):
        self.name = name
        self._workload: Workload | None = None
        self._leave = threading.Event()
        self._lock = threading.Lock()  # of the two below, which are numbers of memberships
        self._present = 0  # the one that it is in, or was last
        self._asked_to_leave = 0  # the latest one that it was asked to end

    @ray.method(concurrency_group="loop")
    def prepare(self, job: Job, aside: bool) -> HostInfo:
        """Make the job's workload and do its slow first-time work.

        Args:
            aside: whether others that compute here go first meanwhile.
        """
        if not job.use_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        def open_workload() -> Workload:
            workload = self._workload = job.open(self.name, self._leave)
            workload.warm_up()
            return workload

        if aside:
            with ThreadPoolExecutor(1, initializer=step_aside) as pool:
                pool.submit(open_workload).result()
        else:
            open_workload()
        pid, ip = os.getpid(), ray.util.get_node_ip_address()
        return HostInfo(pid, socket.gethostname(), ip, cores_id(), process_start(pid))

    @ray.method(concurrency_group="loop")
    def offer(self, copy: Copy) -> Offer:
        """Offer the newest state that this host or the storage has.

        Args:
            copy: whether the other members need a reference to it.
        """
        known = self._prepared.beat().held
        try:
            newest = self._prepared.newest_state()
        except StorageError as error:
            return Offer(trouble=str(error))
        if newest is None:
            return Offer()
        needed = copy == "always" or (copy == "if new" and newest.id != known)
        return Offer(newest.id, (ray.put(newest.share()),) if needed else ())

    @ray.method(concurrency_group="loop")
    def run(self, membership: Membership, rank: int, state: Any) -> Outcome:
        """Take part in ``membership`` as ``rank`` until it ends."""
        with self._lock:  # it may have been asked to end this one before it begins
            self._present = membership.number
            if self._asked_to_leave < membership.number:
                self._leave.clear()
            else:
                self._leave.set()
        member = membership.members[rank]
        if member.predecessor and not wait_until_gone(*member.predecessor, GONE_SECONDS):
            step = membership.start.step if membership.start else 0
            reason = (
                f"GPU {','.join(member.gpus)} is still in use by process {member.predecessor[0]} of a former worker"
            )
            return Outcome("unable", step, reason)
        if member.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(member.gpus)
        return self._prepared.run(membership, rank, state)

    @ray.method(concurrency_group="loop")
    def commit(self) -> None:
        """Hand the state that this host holds to be written, unless it is."""
        self._prepared.commit()

    @ray.method(concurrency_group="loop")
    def flush(self) -> None:
        """Return once everything that the workload handed to be written is written."""
        self._prepared.flush()

    @ray.method(concurrency_group="control")
    def leave(self, number: int) -> None:
        """End membership ``number`` at the next step that all members can agree on."""
        with self._lock:
            self._asked_to_leave = number
            if number == self._present:
                self._leave.set()

    @ray.method(concurrency_group="control")
    def abort(self, number: int) -> None:
        """Make a member of membership ``number`` end it where it does not by itself."""
        self._prepared.abort(number)

    @ray.method(concurrency_group="control")
    def address(self) -> tuple[str, int]:
        """Host and port where this host would listen as rank 0."""
        return free_address(ray.util.get_node_ip_address())

    @ray.method(concurrency_group="control")
    def status(self) -> Beat:
        """How the workload is; an answer at all says that the process is alive."""
        return self._workload.beat() if self._workload is not None else Beat()

    @property
    def _prepared(self) -> Workload:
        if self._workload is None:
            raise RuntimeError(f"The host {self.name} was asked to work before it was prepared.")
        return self._workload


def start_host(name: str, node: str) -> Any:
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


def kill_host(handle: Any, node: str = "", process: Process | None = None) -> None:
    """End a host; with its node and its process also one that is stopped, by a task there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with contextlib.suppress(Exception):
        ray.kill(handle)

    def kill(pid: int, started: int | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if started is None or process_start(pid) == started:
                os.kill(pid, signal.SIGKILL)

    if process is not None:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(*process)
