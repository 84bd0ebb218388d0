"""Where a run may have its workers: seats that Ray Train holds, and moves when nodes arrive, drain or die.

Ray Train's own elastic policy asks its autoscaling coordinator, whose picture of the cluster is up to 20 s old, and
waits for a placement group on a node that is gone. The policy here asks the cluster itself, each time anew.

`SeatPolicy`, `Group` and `LossPolicy` build on internals of Ray Train V2: checked with Ray 2.60.
"""

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from doge.common.errors import UserError
from doge.common.words import count

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # between two looks at the seats
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # then the cluster is looked at anew
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would hold the seats on a draining node until its deadline
}
LOST = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
PROBE_SECONDS = 1.0
SILENT_SECONDS = 5.0  # that a running group's node may leave a probe without an answer
WAIT_SECONDS = 0.25  # between two looks at a cluster without room


@dataclass(frozen=True)
class Seats:
    """The seats that a run asks for.

    Args:
        resources: that a seat reserves, such as ``{"CPU": 1, "GPU": 1}``; at least one is above 0.
        min_workers: below which the run waits.
        max_workers: at most; None takes all that the cluster has, and asks no autoscaler for more than ``min_workers``.
        wait_timeout_s: seconds to wait for room before the run fails.
        interval_s: seconds between two looks at the cluster while the seats are held.
        one_per_node: whether a node has room for one seat at most.
    """

    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    min_workers: int = 1
    max_workers: int | None = None
    wait_timeout_s: float = 600.0
    interval_s: float = 2.0
    one_per_node: bool = False


@dataclass(frozen=True)
class View:
    """The cluster's nodes at one moment.

    Args:
        free: resources of every node that takes new work, by node id.
        unusable: ids of the nodes that drain, or that are gone though Ray does not know it yet.
        silent: ids of the nodes that did not answer in time; they take no new work, but may come back.
    """

    free: dict[str, dict[str, float]]
    unusable: set[str]
    silent: set[str]

    def room(self, seats: Seats, held: dict[str, int]) -> int:
        """Seats that there can be, where ``held`` counts those that a node has already."""
        each = [_fitting(seats.resources, free) + held.get(node, 0) for node, free in self.free.items()]
        number = sum(min(seats_here, 1) if seats.one_per_node else seats_here for seats_here in each)
        return number if seats.max_workers is None else min(number, seats.max_workers)


def look(busy: bool = True) -> View:
    """Ask Ray for the nodes and their free resources, and every node's raylet whether it is there.

    Args:
        busy: what others use is not free; False counts all that the nodes have.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    free = ray._private.state.available_resources_per_node() if busy else {n: d["Resources"] for n, d in nodes.items()}
    with ThreadPoolExecutor(min(len(nodes), 32) or 1) as pool:
        answers = dict(zip(nodes, pool.map(_answers, nodes.values()), strict=True))
    silent = {node for node, answer in answers.items() if answer is None}
    unusable = {node for node, answer in answers.items() if answer is False}
    unusable |= nodes.keys() & ray._private.state.state.get_draining_nodes().keys()
    usable = nodes.keys() - silent - unusable
    return View({node: free.get(node, {}) for node in usable}, unusable, silent)


def possible_workers(seats: Seats) -> int:
    """Workers that there can be on the nodes that are alive and stay, if nobody else uses them."""
    return look(busy=False).room(seats, {})


def describe_cluster() -> str:
    """What the cluster has, for a message: "the cluster has 2 nodes, 4 CPUs, 0 GPUs"."""
    view = look(busy=False)
    cpus, gpus = (sum(free.get(name, 0) for free in view.free.values()) for name in ("CPU", "GPU"))
    nodes = f"the cluster has {count(len(view.free), 'node')}, {count(cpus, 'CPU')}, {count(gpus, 'GPU')}"
    leaving = len(view.unusable | view.silent)
    return nodes + (f", and {count(leaving, 'node')} on the way out" if leaving else "")


def _fitting(resources: dict[str, float], free: dict[str, float]) -> int:
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in resources.items() if amount > 0)


def _answers(node: dict[str, Any]) -> bool | None:
    """Whether the node's raylet takes a connection; None if nothing came back in time.

    Ray notices a raylet that was killed after 13-15 s with its default settings, a refused connection at once.
    """
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True


class Group(WorkerGroupCallback):
    """Knows the group that holds resources now. It lives where the policy does: in the process of the controller."""

    state: WorkerGroupState | None = None

    def before_worker_group_start(self, worker_group_context) -> None:
        if Group.state is not None:  # Ray leaves a group behind that fails late in its start
            Group.state.shutdown()
            Group.state = None

    def after_worker_group_start(self, worker_group) -> None:
        Group.state = worker_group.get_worker_group_state()

    def before_worker_group_shutdown(self, worker_group) -> None:
        for worker in worker_group.get_workers():  # a farewell to a worker of a dead node takes 5 s
            ray.kill(worker.actor)

    def after_worker_group_shutdown(self, worker_group_context) -> None:
        Group.state = None

    after_worker_group_abort = after_worker_group_shutdown

    @staticmethod
    def held() -> dict[str, int]:
        """Seats by node id."""
        held: dict[str, int] = {}
        for worker in Group.state.workers if Group.state else ():
            held[worker.metadata.node_id] = held.get(worker.metadata.node_id, 0) + 1
        return held


class SeatPolicy(ScalingPolicy):
    """Decides from a fresh look at the cluster where the run has its workers.

    Raises UserError, which ends the run, if there was no room for ``min_workers`` for ``wait_timeout_s`` seconds.
    """

    def __init__(self, scaling_config: ScalingConfig, seats: Seats):
        super().__init__(scaling_config)
        self._seats = seats
        self._waiting_since: float | None = None
        self._looked = float("-inf")
        self._answered: dict[str, float] = {}  # when a silent node was last known to be there
        self._avoid: set[str] = set()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        seats, view = self._seats, look()
        self._looked, self._avoid = time.monotonic(), view.unusable | view.silent
        room = view.room(seats, Group.held())
        if room >= seats.min_workers:
            self._waiting_since = None
            return self._resize(room)
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since >= seats.wait_timeout_s:
            each = " and ".join(count(amount, name) for name, amount in seats.resources.items() if amount)
            raise UserError(
                f"{count(seats.min_workers, 'worker')} with {each} each found no room for {seats.wait_timeout_s:g} s: "
                f"{describe_cluster()}, with room for {room or 'none'} now. Add nodes, or ask for fewer workers."
            )
        time.sleep(WAIT_SECONDS)  # the controller asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status) -> ScalingDecision:
        self._maybe_send_resource_request()
        seats = self._seats
        if time.monotonic() - self._looked < seats.interval_s:
            return NoopDecision()
        view, held = look(), Group.held()
        self._looked = time.monotonic()
        self._answered = {node: self._answered.get(node, self._looked) for node in view.silent}
        lost = view.unusable | {n for n, since in self._answered.items() if self._looked - since > SILENT_SECONDS}
        hesitating = {node: held[node] for node in view.silent - lost if node in held}
        room = min(view.room(seats, held) + sum(hesitating.values()), seats.max_workers or float("inf"))
        self._avoid = view.unusable | view.silent
        must_move = any(node in lost for node in held)
        if room < seats.min_workers or (room <= sum(held.values()) and not must_move) or hesitating:
            return NoopDecision()
        return self._resize(int(room))

    def on_controller_start_worker_group(self, *, scaling_config, num_workers) -> dict[str, str] | None:
        """Keep new seats off the nodes that Ray still believes in."""
        return {"ray.io/node-id": f"!in({','.join(sorted(self._avoid))})"} if self._avoid else None

    def _resize(self, num_workers: int) -> ResizeDecision:
        return ResizeDecision(num_workers=num_workers, resources_per_worker=self._seats.resources)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._seats.max_workers or self._seats.min_workers


class LossPolicy(DefaultFailurePolicy):
    """Losing seats is never too much; what a seat's own function raises is, after a few times, and a UserError at once.

    Ray Train's policy for the rest: an error of our scaling policy ends the run.
    """

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            raised = _raised(training_failed_error)
            if not raised:
                return FailureDecision.RETRY
            if any(isinstance(error, UserError) for error in raised):
                return FailureDecision.RAISE
        elif isinstance(getattr(training_failed_error, "controller_failure", None), ray.exceptions.RayActorError):
            return FailureDecision.RETRY  # lost while the group started
        return super().make_decision(training_failed_error)


def _raised(error: WorkerGroupError) -> list[BaseException]:
    """What the seats' functions raised; a seat whose process was lost raised nothing."""
    return [failure for failure in error.worker_failures.values() if not isinstance(failure, LOST)]


class SeatTrainer(DataParallelTrainer):
    """A Ray Train run whose workers only hold seats.

    Args:
        sit: what every seat does, called with ``config``; the run is over when all have returned. It is begun anew,
            in a new process, whenever the seats change.
        config: for ``sit``.
        seats: that are asked for.
        name: of Ray Train's own run, under ``storage_path``.
        storage_path: directory or URI for Ray Train's own small records.
    """

    def __init__(self, sit: Callable[[dict], None], config: dict, seats: Seats, name: str, storage_path: str):
        super().__init__(
            sit,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=seats.min_workers,
                use_gpu=seats.resources.get("GPU", 0) > 0,
                resources_per_worker=seats.resources,
                placement_strategy="STRICT_SPREAD" if seats.one_per_node else "PACK",
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage_path,
                failure_config=FailureConfig(max_failures=3),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        self._seats = seats
        self._controller = None

    def fit(self) -> None:
        """Hold the seats until all of them have returned.

        Raises:
            UserError: no room within ``wait_timeout_s`` seconds, or one that a seat raised.
            ray.train.TrainingFailedError: the seats' function keeps raising, or Ray Train itself fails.
            KeyboardInterrupt: after the seats were given up.
        """
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            super().fit()
        except ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from None
            raise
        except WorkerGroupError as error:
            for raised in _raised(error):
                if isinstance(raised, UserError):
                    raise raised from None
            raise
        except KeyboardInterrupt:
            self._give_up()
            raise

    def _initialize_and_run_controller(self, **arguments):
        arguments |= {
            "scaling_policy": SeatPolicy(self.scaling_config, self._seats),
            "failure_policy": LossPolicy(self.run_config.failure_config),
        }
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list:
        return [PlacementGroupCleanerCallback(), Group()]  # the others set up what a seat does not use

    def _register_sigint_handler(self, controller) -> None:
        """Python's own handler stays: Ray Train's waits for a controller that may be waiting for room, and exits."""
        self._controller = controller

    def _give_up(self) -> None:
        if self._controller is not None:
            try:
                ray.get(self._controller.abort.remote(), timeout=5)
            except ray.exceptions.RayError:  # it has ended, as it should, or does not listen
                ray.kill(self._controller)
